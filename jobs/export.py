"""The `export` verb: a stage's weights as a folder that transformers loads without this project."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from infra.checkpoint import Checkpoint, CheckpointStore
from infra.config_io import ConfigError
from infra.ledger import Ledger
from infra.runtime import provenance
from jobs.batch_work import normalise
from jobs.export_code import STAND_INS, ExportError, standalone_code
from jobs.exported import PREPROCESSOR, VOCABULARY
from jobs.hub import check_export
from jobs.model_card import model_card
from jobs.pretrain import StageContext, open_tokenizer
from jobs.progress import ProgressReport
from jobs.ranks import SingleRank
from jobs.recipe import Recipe
from jobs.run_dir import RunDir
from model.config import ModelConfig
from model.pretrained import load_model, save_model
from model.video_text_model import VideoTextModel
from model.weights import load_for_num_frames
from pipeline.manifest import read_manifest
from pipeline.storage import storage_path
from pipeline.text import CaptionTokenizer

TOLERANCE = 1e-5
CHECK_CAPTION = "#C C picks up the red cup, then puts it down."
_CHECK_TIMEOUT_S = 600
# Installed here, and not where exported folders are loaded.
_HIDDEN = ("model", "pipeline", "jobs", "infra", "einops", "triton", "nvidia", "ray", "deepspeed", "mlflow")
_AUTO_MAP = {
    "AutoConfig": "configuration_svitt_ego.SvittEgoConfig",
    "AutoModel": "modeling_svitt_ego.SvittEgoModel",
}


def export(run: RunDir, output: Path, stage: int | None, report: ProgressReport) -> int:
    """Writes the newest checkpoint of stage `stage` (default: the newest with one) to the new folder `output`.

    The folder is loaded by transformers in a process of its own before it gets its name, and has to give the same
    features. Raises ExportError when it does not, when `output` exists already, or when the shards are not those of
    the training; ConfigError when there is no such stage or checkpoint.
    """
    if output.exists():
        raise ExportError(
            f"{output} exists already and is not overwritten; delete it or give another --output"
        )
    recipe = run.recipe()
    number, checkpoint = newest_checkpoint(run, recipe, stage)
    tokenizer = open_tokenizer(recipe)
    manifest = read_manifest(storage_path(recipe.data.shards) / "train")
    trained_on = checkpoint.meta["data_fingerprint"]
    if trained_on != manifest.fingerprint:
        raise ExportError(
            f"{checkpoint.path} was trained on data with fingerprint {trained_on}, and {recipe.data.shards}/train now "
            f"has {manifest.fingerprint}: its vocabulary may be another; put the shards of the training back"
        )
    model = exported_model(run, recipe, number, checkpoint, tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.parent / f".{output.name}.{uuid.uuid4().hex}.part"
    try:
        write_export(part, model, tokenizer, recipe)
        card = model_card(run, number, checkpoint.step, manifest, provenance()["commit"])
        (part / "README.md").write_text(card, encoding="utf-8")
        difference = check(part, tokenizer)
        os.rename(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    name = recipe.stages[number - 1].name
    report.say(f"stage {number} ({name}), step {checkpoint.step}: {model.config.num_parameters()} parameters")
    report.say(f"loaded by transformers alone, its features differ from ours by at most {difference:.1e}")
    report.say(f"exported to {output}")
    return 0


def newest_checkpoint(run: RunDir, recipe: Recipe, stage: int | None) -> tuple[int, Checkpoint]:
    """Number of the stage and its newest undamaged checkpoint. Raises ConfigError when there is none."""
    if stage is not None:
        run.stage(stage)
    for number in [stage] if stage is not None else range(len(recipe.stages), 0, -1):
        found = CheckpointStore(run.checkpoints(number), rank=1).newest_good()
        if found is not None:
            return number, found
    raise ConfigError(
        str(run.path), [f"no checkpoint of stage {stage or 'any'} yet; train it first: svitt resume"]
    )


def exported_model(
    run: RunDir, recipe: Recipe, number: int, checkpoint: Checkpoint, tokenizer: CaptionTokenizer
) -> VideoTextModel:
    """The checkpoint's model in evaluation mode, with attention and memory as an exported one has them."""
    context = StageContext(
        run, recipe, number, torch.device("cpu"), SingleRank(), tokenizer, Ledger(run.ledger_file)
    )
    plain = {"recompute": "none", "offload_activations": False}
    config = context.model_config().replaced(video={**plain, "attention_backend": "blocks"}, text=plain)
    model = VideoTextModel(config)
    load_for_num_frames(model, checkpoint.load_weights())
    return model.eval()


def write_export(folder: Path, model: VideoTextModel, tokenizer: CaptionTokenizer, recipe: Recipe) -> None:
    """Weights, settings, tokenizer and code. `folder` must not exist."""
    save_model(model, folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write_json(
        folder / "config.json",
        {"model_type": "svitt_ego", "architectures": ["SvittEgoModel"], "auto_map": _AUTO_MAP, **settings},
    )
    _write_json(folder / PREPROCESSOR, _preprocessor(model.config, recipe))
    _write_tokenizer(folder, tokenizer)
    for name, source in standalone_code().items():
        (folder / name).write_text(source, encoding="utf-8")


def _preprocessor(config: ModelConfig, recipe: Recipe) -> dict[str, Any]:
    """Fields of Hugging Face's processors where these have one; `short_side` comes before `size`."""
    side = config.video.image_size
    return {
        "num_frames": config.video.num_frames,
        "frame_sampling": "the frames nearest to the middles of num_frames equal parts of the clip",
        "short_side": recipe.prepare.short_side,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "text_length": recipe.loader.text_length,
    }


def _write_tokenizer(folder: Path, tokenizer: CaptionTokenizer) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.with_cleaning(),
        model_max_length=tokenizer.max_length,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    # The name that transformers 4 knows too.
    file = folder / "tokenizer_config.json"
    _write_json(file, {**json.loads(file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"})
    vocabulary = sorted(fast.get_vocab().items(), key=lambda entry: entry[1])
    text = "".join(f"{token}\n" for token, _ in vocabulary)
    (folder / VOCABULARY).write_text(text, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check(folder: Path, tokenizer: CaptionTokenizer) -> float:
    """Largest difference between features of the folder, loaded by transformers in a fresh process, and by ourselves.

    Of one generated clip and one caption. That process cannot import the packages which exported folders do without.
    Raises ExportError when the process fails or the difference exceeds `TOLERANCE`.
    """
    model = load_model(folder).model
    video = model.config.video
    shape = (1, video.num_frames, 3, video.image_size, video.image_size)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids_BL, mask_BL = tokenizer([CHECK_CAPTION])
    with torch.no_grad():
        pixels = normalise(clip, torch.device("cpu"), torch.float32)
        ours = {
            "video_features": model.encode_video(pixels).features_BP,
            "text_features": model.encode_text(ids_BL, mask_BL).features_BP,
        }
    return largest_difference(_features_of_fresh_process(folder, clip), ours)


def largest_difference(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of tensors of the same names. Raises ExportError above `TOLERANCE`, and at NaN."""
    # Python's max would lose a NaN.
    difference = float(torch.stack([(theirs[name] - ours[name]).abs().max() for name in ours]).max())
    if not difference <= TOLERANCE:
        raise ExportError(
            f"checked the export: features that transformers computes from it differ from ours by {difference:.1e}, "
            f"expected at most {TOLERANCE:.0e}; nothing was written. This is a fault of jobs.export_code or jobs.hub"
        )
    return difference


def _features_of_fresh_process(folder: Path, clip: Tensor) -> dict[str, Tensor]:
    hidden = [*_HIDDEN, *(name for name in STAND_INS if "." not in name)]
    with tempfile.TemporaryDirectory(prefix="svitt-export-") as scratch:
        inputs, outputs = Path(scratch) / "inputs.safetensors", Path(scratch) / "outputs.safetensors"
        save_file({"pixel_values": clip}, inputs)
        # The process runs elsewhere, where a relative folder would be taken for the name of a model on a hub.
        arguments = [str(folder.resolve()), str(inputs), str(outputs), CHECK_CAPTION, *hidden]
        try:
            run = subprocess.run(
                [sys.executable, "-I", check_export.__file__, *arguments],
                capture_output=True,
                text=True,
                timeout=_CHECK_TIMEOUT_S,
                cwd=scratch,
                env={**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"},
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"checked the export: transformers had not loaded and run it after {_CHECK_TIMEOUT_S} s, so nothing "
                "was written; try again on a machine that is less busy"
            ) from error
        try:
            return load_file(outputs)
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"checked the export: transformers could not load and run it (exit code {run.returncode}), so nothing "
                f"was written. The end of what it said:\n{run.stderr[-3000:]}"
            ) from error
