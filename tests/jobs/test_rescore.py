"""`evaluate` refuses what it cannot score and says what is missing; and scores a stored checkpoint in every way."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import small_run
from stored_clips import write_set

from infra.checkpoint import CheckpointStore
from infra.config_io import ConfigError
from infra.ledger import Ledger
from jobs.answers import compare_answers, read_answers
from jobs.epic_mir import CAPTIONS_FILE, CLIPS_FILE
from jobs.pretrain import StageContext, open_tokenizer
from jobs.ranks import SingleRank
from jobs.rescore import Extras, rescore
from jobs.run_dir import RunDir
from model.video_text_model import VideoTextModel
from pipeline.errors import DataError, ShardError
from pipeline.questions import McqQuestion, McqSet, questions_to_bytes
from pipeline.store import ClipStore

STEP = 20


def test_a_stage_that_is_not_there_and_one_without_checkpoint_are_told_apart(
    tmp_path: Path, report_lines
) -> None:
    report, _ = report_lines
    run = small_run(tmp_path)
    with pytest.raises(ConfigError, match="there is no stage 9; there are 1 to 2"):
        rescore(run, 9, report)
    with pytest.raises(ConfigError, match="no checkpoint of stage 2 yet"):
        rescore(run, 2, report)


def scorable_run(folder: Path) -> RunDir:
    """A run with 12 stored clips, one inter and one intra question, and an untrained checkpoint of stage 2."""
    run = small_run(folder, "evaluation.batch_size=5", "loader.num_threads=1")
    recipe = run.recipe()
    train, held_out = (Path(recipe.data.shards) / name for name in ("train", "egomcq"))
    write_set(train)
    write_set(held_out)
    with ClipStore(held_out) as store:
        ids = [store.clip_id(row) for row in range(12)]
        questions = tuple(
            McqQuestion(
                number, kind, store.caption(number), ids[number], tuple(ids[:5]), number, kind == "intra"
            )
            for number, kind in enumerate(("inter", "intra"))
        )
    (held_out / "questions.json").write_bytes(questions_to_bytes(McqSet(questions, ())))
    context = StageContext(
        run, recipe, 2, torch.device("cpu"), SingleRank(), open_tokenizer(recipe), Ledger(run.ledger_file)
    )
    torch.manual_seed(0)
    model = VideoTextModel(context.model_config())
    store = CheckpointStore(run.checkpoints(2))
    ranks = SingleRank()
    store.save(STEP, lambda _: None, {}, model.state_dict(), {}, any_rank=ranks.any)
    store.wait(ranks.any)
    return run


def test_a_checkpoint_is_scored_and_its_answers_are_kept(tmp_path: Path, report_lines) -> None:
    report, lines = report_lines
    run = scorable_run(tmp_path)
    assert rescore(run, None, report) == 0
    words, numbers = lines()
    assert words.startswith(f"stage 2 (long), step-{STEP:08d}: EgoMCQ inter ")
    metrics = json.loads(numbers)
    assert metrics["eval/egomcq/inter_video_n"] == metrics["eval/egomcq/intra_video_n"] == 1
    assert metrics["eval/temporal_probe/reversed_n"] == 1
    assert not any("retrieval" in name or "vtm" in name for name in metrics)
    sheet = read_answers(run.stage_dir(2) / "answers.parquet")
    assert [answer.kind for answer in sheet.answers] == ["inter", "intra"]
    assert (sheet.facts["stage"], sheet.facts["step"], sheet.facts["mode"]) == (2, STEP, "dual")
    assert 100 * sheet.answers[0].is_correct == metrics["eval/egomcq/inter_video_acc"]
    assert compare_answers(sheet, sheet, "intra").p_value == 1
    assert sorted(entry.name for entry in run.stage_dir(2).iterdir()) == ["answers.parquet", "checkpoints"]


def test_retrieval_and_the_matching_head_come_on_request_and_change_nothing_else(
    tmp_path: Path, report_lines
) -> None:
    report, lines = report_lines
    run = scorable_run(tmp_path)
    rescore(run, 2, report)
    rescore(run, 2, report, Extras(retrieval=True, vtm=True))
    _, plain, _, matched, text_to_video, video_to_text, full = lines()
    assert matched.startswith("EgoMCQ by the matching head: inter ")
    assert text_to_video.startswith("retrieval text to video: R@1 ")
    assert video_to_text.endswith("(n 12)")
    plain, full = json.loads(plain), json.loads(full)
    assert {name: full[name] for name in plain} == plain
    assert full["eval/egomcq_vtm/inter_video_n"] == 1
    assert full["eval/retrieval/text_to_video_n"] == 12
    sheet = read_answers(run.stage_dir(2) / "answers-vtm.parquet")
    assert sheet.facts["mode"] == "matching"
    assert 100 * sheet.answers[1].is_correct == full["eval/egomcq_vtm/intra_video_acc"]


def write_annotations(folder: Path) -> None:
    """EPIC-KITCHENS-100's retrieval files for the twelve clips of `write_set`, and captions for the first six."""
    folder.mkdir()
    clips = [
        f"P_{i},v{i % 2},00:00:{2 * i:02d}.00,00:00:{2 * i + 1:02d}.00,#C C moves cup {i},{i % 3},[{i % 2}]"
        for i in range(12)
    ]
    header = "narration_id,video_id,start_timestamp,stop_timestamp,narration,verb_class,all_noun_classes"
    (folder / CLIPS_FILE).write_text("\n".join([header, *clips]))
    sentences = [f"P_{i},#C C moves cup {i}" for i in range(6)]
    (folder / CAPTIONS_FILE).write_text("\n".join(["narration_id,narration", *sentences]))


def test_epic_kitchens_retrieval_is_scored_on_shards_of_its_own(tmp_path: Path, report_lines) -> None:
    report, lines = report_lines
    run = scorable_run(tmp_path)
    shards = write_set(tmp_path / "epic" / "train")
    write_annotations(tmp_path / "files")
    rescore(run, 2, report, Extras(epic_mir=(str(shards), str(tmp_path / "files"))))
    _, *words, numbers = lines()
    assert [line.split(":")[0] for line in words] == [
        "EPIC-KITCHENS-100 text to video",
        "EPIC-KITCHENS-100 video to text",
        "EPIC-KITCHENS-100 mean",
    ]
    metrics = json.loads(numbers)
    assert (metrics["eval/epic_mir/text_to_video_n"], metrics["eval/epic_mir/video_to_text_n"]) == (6, 12)
    assert 0 < metrics["eval/epic_mir/mean_map"] <= metrics["eval/epic_mir/mean_official_map"] <= 100
    assert metrics["eval/egomcq/inter_video_n"] == 1


def test_annotations_that_are_not_there_are_told_before_anything_is_scored(
    tmp_path: Path, report_lines
) -> None:
    report, lines = report_lines
    run = scorable_run(tmp_path)
    with pytest.raises(DataError, match=CLIPS_FILE):
        rescore(run, 2, report, Extras(epic_mir=(str(tmp_path), str(tmp_path))))
    assert lines() == []


def test_shards_that_are_not_there_are_told_before_anything_is_scored(tmp_path: Path, report_lines) -> None:
    report, lines = report_lines
    run = scorable_run(tmp_path)
    write_annotations(tmp_path / "files")
    with pytest.raises(ShardError, match="nowhere"):
        rescore(run, 2, report, Extras(epic_mir=(str(tmp_path / "nowhere"), str(tmp_path / "files"))))
    assert lines() == []


def test_a_bad_sweep_is_refused_before_anything_is_scored(tmp_path: Path, report_lines) -> None:
    report, lines = report_lines
    run = scorable_run(tmp_path)
    with pytest.raises(ConfigError, match="with one of num_frames"):
        rescore(run, 2, report, Extras(sweep=("depth=2",)))
    assert lines() == []


def test_a_sweep_is_written_into_the_stage(
    tmp_path: Path, report_lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Counting would replace torch's allocator for all tests that follow.
    monkeypatch.setattr("jobs.rescore.open_budget", lambda device, limit: (None, 0))
    report, _ = report_lines
    run = scorable_run(tmp_path)
    rescore(run, 2, report, Extras(sweep=("keep_rate=1.0",)))
    written = json.loads((run.stage_dir(2) / "sweep.json").read_text())
    assert (written["stage"], written["step"], written["checkpoint"]) == (2, STEP, f"step-{STEP:08d}")
    # 4 frames of 4 x 4 patches, half of them kept twice.
    assert [point["tokens_out"] for point in written["points"]] == [16, 64]
    assert [point["peak_bytes"] for point in written["points"]] == [None, None]
