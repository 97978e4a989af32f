"""`svitt export`: the folder loads without this project, says where it comes from, or does not exist."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import finish_stage, small_run
from trained_runs import trained_run
from transformers import PreTrainedTokenizerFast

from infra.config_io import ConfigError
from infra.journal import Journal
from jobs.batch_work import normalise
from jobs.export import export, largest_difference
from jobs.export_code import ALLOWED_PACKAGES, ExportError, standalone_code
from jobs.exported import load_exported
from jobs.pretrain import open_tokenizer
from jobs.progress import ProgressReport
from model.errors import WeightsError
from pipeline.manifest import read_manifest

Report = tuple[ProgressReport, Callable[[], list[str]]]

NARRATIONS = [
    "#C C moves cup 3",
    "#O man X Moves the CUP, slowly!",
    "#unsure re-opens/closes a jar",
    "caf\u00e9: moves ~ (cup) *4*",
    "moves moves moves moves moves moves moves moves moves moves",
]


def test_an_export_gives_our_features_by_transformers_alone_and_tells_its_story(
    tmp_path: Path, report_lines: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, lines = report_lines
    monkeypatch.chdir(tmp_path)
    run, model = trained_run(tmp_path)
    finish_stage(run, 1, 40)
    journal = Journal(run.journal(1))
    # 20 steps of 8 clips at 1.6 clips/s and 20 at 0.8: 100 s + 200 s.
    journal.metrics(20, {"perf/clips_per_s": 1.6, "mem/peak_rss_gib": 0.5})
    journal.metrics(40, {"perf/clips_per_s": 0.8, "mem/peak_rss_gib": 0.75})
    journal.close()
    parent = Journal(run.journal(0))
    parent.tags({"commit": "abc123", "is_dirty": False})
    parent.close()
    folder = Path("exports") / "small"  # relative, as people write it

    assert export(run, folder, 1, report) == 0

    # A process that can import neither this project nor jaxtyping, pydantic or einops gave the same: export checks it.
    assert any("loaded by transformers alone" in line for line in lines())
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    settings = json.loads((folder / "config.json").read_text())
    assert settings["auto_map"]["AutoModel"] == "modeling_svitt_ego.SvittEgoModel"
    assert settings["config"]["video"]["attention_backend"] == "blocks"
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert (preprocessor["num_frames"], preprocessor["size"]) == (2, {"height": 32, "width": 32})
    assert preprocessor["short_side"] == run.recipe().prepare.short_side

    exported = load_exported(folder)
    clips = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        pixels = normalise(clips, torch.device("cpu"), torch.float32)
        video_features = model.encode_video(pixels).features_BP
        ids_BL, mask_BL = open_tokenizer(run.recipe())(NARRATIONS)
        text_features = model.encode_text(ids_BL, mask_BL).features_BP
    torch.testing.assert_close(exported.encode_clips(clips), video_features, atol=1e-5, rtol=0)
    torch.testing.assert_close(exported.encode_sentences(NARRATIONS), text_features, atol=1e-5, rtol=0)

    theirs = PreTrainedTokenizerFast.from_pretrained(folder)(
        NARRATIONS, padding="max_length", truncation=True, return_tensors="pt"
    )
    torch.testing.assert_close(theirs["input_ids"], ids_BL)
    torch.testing.assert_close(theirs["attention_mask"].bool(), mask_BL)

    card = (folder / "README.md").read_text()
    manifest = read_manifest(Path(run.recipe().data.shards) / "train")
    for said in (
        "12 narrated clips for training, 0 of 12 planned ones rejected as unreadable; fingerprint "
        f"`{manifest.fingerprint}`",
        "1. **short**, 40 of 40 steps: 2 frames, keep rate 0.5",
        "| EgoMCQ inter | 71.2 [66.4, 75.6] | 400 |",
        "| temporal probe, frames shuffled | 41.0 [31.9, 50.8] | 100 |",
        "| short | 1.2 | 5.0 | 0.75 |",
        "trained by commit abc123, exported by commit",
        "`svitt export small --stage 1 --output FOLDER`",
        "workspace: .",
    ):
        assert said in card
    assert str(tmp_path) not in card


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path, report_lines: Report) -> None:
    run = small_run(tmp_path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ExportError, match="taken exists already and is not overwritten"):
        export(run, tmp_path / "taken", None, report_lines[0])


def test_shards_of_another_preparation_are_refused_and_nothing_is_left(
    tmp_path: Path, report_lines: Report
) -> None:
    run, _ = trained_run(tmp_path)
    manifest = Path(run.recipe().data.shards) / "train" / "manifest.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**fields, "fingerprint": "0" * 64}))
    with pytest.raises(ExportError, match="put the shards of the training back"):
        export(run, tmp_path / "exports" / "small", None, report_lines[0])
    assert not (tmp_path / "exports").exists()


def test_a_stage_without_checkpoint_is_named(tmp_path: Path, report_lines: Report) -> None:
    with pytest.raises(ConfigError, match="no checkpoint of stage 2 yet"):
        export(small_run(tmp_path), tmp_path / "small", 2, report_lines[0])


def test_other_features_and_features_that_are_no_numbers_are_refused() -> None:
    ours = {"video": torch.tensor([0.6, 0.8]), "text": torch.tensor([1.0, 0.0])}
    near = {"video": torch.tensor([0.6, 0.8 + 5e-6]), "text": torch.tensor([1.0, 0.0])}
    assert largest_difference(near, ours) == pytest.approx(5e-6, rel=0.05)
    far = {"video": torch.tensor([0.6, 0.8]), "text": torch.tensor([1.0, 2e-5])}
    with pytest.raises(ExportError, match=r"differ from ours by 2\.0e-05"):
        largest_difference(far, ours)
    with pytest.raises(ExportError, match="by nan"):
        largest_difference({**ours, "text": torch.tensor([float("nan"), 0.0])}, ours)


def test_exported_code_imports_its_own_files_and_what_its_users_have() -> None:
    files = standalone_code()
    assert {"modeling_svitt_ego.py", "configuration_svitt_ego.py", "video_encoder.py"} <= files.keys()
    assert not {"attention_fused.py", "attention_triton.py", "kernel_build.py"} & files.keys()
    for name, source in files.items():
        assert '"svitt::' not in source, f"{name}: an operator of this name is registered by this project too"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                assert f"{node.module}.py" in files, f"{name} imports .{node.module}"
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").partition(".")[0] not in {"model", "jobs", "jaxtyping", "pydantic"}
    assert "einops" not in ALLOWED_PACKAGES


def test_code_that_needs_more_than_its_users_have_is_refused_by_name() -> None:
    with pytest.raises(
        ExportError, match=r"jobs\.progress imports rich\.console in line \d+, which an exported"
    ):
        standalone_code("jobs.progress")


def test_a_folder_that_is_no_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="give a folder that svitt export wrote"):
        load_exported(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"short_side": 64, "text_length": 8}')
    with pytest.raises(WeightsError, match=r"holds none of model\.safetensors"):
        load_exported(tmp_path)
