"""Whole models from weights: published SViTT checkpoints, Hugging Face BEiT and BERT, and our own folders.

Local files only. Every loader is strict and says what became of each key; sizes come from the weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from torch import Tensor

from model.checkpoint_files import plain, read_checkpoint, tensors_of, write_folder
from model.config import ModelConfig
from model.errors import WeightsError
from model.hf_weights import beit_settings, bert_settings, from_hf_beit, from_hf_bert
from model.official_weights import from_official, settings_from_official
from model.video_text_model import VideoTextModel
from model.weight_sizes import text_sizes, video_sizes
from model.weights import InflationRule, LoadReport, load_for_num_frames

_OUR_FORMAT = {"family": "svitt-ego-pipeline", "version": 1}
_BERT_BASE_IDS = {"cls_id": 101, "mask_id": 103}
_BERT_BASE_VOCABULARY = 30522
_MLM_HEAD = "text_encoder.mlm_head."


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and what became of every key."""

    model: VideoTextModel
    report: LoadReport


@dataclass(frozen=True, slots=True)
class PretrainedPart:
    """Weights of one encoder under our names, and the settings that follow from them.

    `video` and `text` are fields for `ModelConfig.replaced`; `own_prefixes` say which keys of the model it covers.
    """

    state: dict[str, Tensor]
    video: dict[str, Any]
    text: dict[str, Any]
    own_prefixes: tuple[str, ...]


def load_official_svitt(
    source: str | Path | Mapping[str, Any],
    *,
    image_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
    official_quirks: bool = True,
    inflation: InflationRule = "nearest",
    allow_unused: bool = False,
    video: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **top: Any,
) -> LoadedModel:
    """A published SViTT or SViTT-Ego checkpoint (pre-training or retrieval) as a model of ours.

    `source` is a file (`.pth`, `.safetensors`) or a state dict, maybe under `model`. All sizes are read from the
    weights; sparsity from `settings` (a dict with `vision_encoder_args`, `text_encoder_args`), else from the settings
    in the checkpoint, else it is our default, which is the released one. `image_size` is only needed where the
    checkpoint keeps no index buffers and is not for 224 px. `video`, `text` and other fields of `ModelConfig` override;
    another `num_frames` inflates the tables by the `inflation` rule. The released weights were trained with the quirks
    of their code, so these are on unless `official_quirks` is False. Retrieval checkpoints have no MLM head: it is
    reported as new. Nothing in a pickled checkpoint is run. Raises WeightsError for another family of checkpoint, for
    missing, left-over or misshaped keys, and for settings that cannot be known.
    """
    state, own_settings = _read_official(source)
    tables = {key for key in state if key.endswith("relative_position_index")}
    num_tokens = state[min(tables)].shape[0] if tables else None
    ours = from_official(state)
    from_settings, multimodal = settings_from_official(settings if settings is not None else own_settings)
    video_fields = {
        **video_sizes(ours, image_size, num_tokens),
        **from_settings,
        "official_quirks": official_quirks,
    }
    text_fields = {**text_sizes(ours), **(text or {})}
    _check_text_settings(text_fields)
    top = {
        "joint_width": ours["video_projection.weight"].shape[0] if "video_projection.weight" in ours else 256,
        "learn_temperature": "learned_temperature" in ours,
        **multimodal,
        **top,
    }
    model = _build({**video_fields, **(video or {})}, text_fields, top)
    has_mlm_head = any(key.startswith(_MLM_HEAD) for key in ours)
    new = () if has_mlm_head else (_MLM_HEAD,)
    report = load_for_num_frames(model, ours, inflation, allow_new=new, allow_unused=allow_unused)
    return LoadedModel(model.eval(), report)


def load_hf_beit(folder: str | Path) -> PretrainedPart:
    """The video encoder of an image model: BEiT from a local Hugging Face folder, for `build_from_parts`.

    Needs `config.json` beside the weights. Raises WeightsError for another family, and for settings of BEiT that this
    encoder does not have (shared or absolute positions).
    """
    state, settings = read_checkpoint(folder)
    _refuse_other_family(state, "BEiT", str(folder))
    ours = from_hf_beit(state)
    image_size = settings.get("image_size")
    sizes = video_sizes(ours, image_size[0] if isinstance(image_size, list) else image_size)
    return PretrainedPart(ours, {**sizes, **beit_settings(settings)}, {}, ("video_encoder.",))


def load_hf_bert(folder: str | Path, cls_id: int | None = None, mask_id: int | None = None) -> PretrainedPart:
    """Text encoder, fusion layers but for their cross-attention, and MLM head if saved: BERT from a local folder.

    The ids of [CLS] and [MASK] are looked up in `vocab.txt` beside the weights unless given. Raises WeightsError for
    another family, other settings than BERT's, or unknown ids.
    """
    state, settings = read_checkpoint(folder)
    _refuse_other_family(state, "BERT", str(folder))
    ours = from_hf_bert(state)
    fields = {**text_sizes(ours), **bert_settings(settings)}
    fields["fusion_layer"] = max(1, fields["depth"] * 3 // 4)
    fields.update(_special_ids(Path(folder), {"cls_id": cls_id, "mask_id": mask_id}, fields["vocab_size"]))
    return PretrainedPart(ours, {}, fields, ("text_encoder.",))


def build_from_parts(
    *parts: PretrainedPart,
    inflation: InflationRule = "nearest",
    video: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **top: Any,
) -> LoadedModel:
    """A model whose encoders start from `parts`; what they do not hold keeps its start and is reported as new.

    Sizes come from the parts; `video`, `text` and other fields of `ModelConfig` override, as in
    `build_from_parts(beit, bert, video={"num_frames": 4})`, which repeats the image tables over time. Raises
    WeightsError when a part does not fit.
    """
    video_fields = {key: value for part in parts for key, value in part.video.items()}
    text_fields = {key: value for part in parts for key, value in part.text.items()}
    model = _build({**video_fields, **(video or {})}, {**text_fields, **(text or {})}, dict(top))
    state = {key: value for part in parts for key, value in part.state.items()}
    covered = tuple(prefix for part in parts for prefix in part.own_prefixes)
    # Within a covered encoder only what its source never has may be missing.
    new = tuple(
        key
        for key in model.state_dict()
        if not key.startswith(covered) or ".crossattention." in key or key.startswith(_MLM_HEAD)
    )
    report = load_for_num_frames(model, state, inflation, allow_new=new)
    return LoadedModel(model.eval(), report)


def save_model(model: VideoTextModel, folder: str | Path) -> None:
    """Write `model.safetensors` and `config.json`, from which `load_model` restores the model exactly."""
    settings = {**_OUR_FORMAT, "config": json.loads(model.config.model_dump_json())}
    write_folder(folder, model.state_dict(), settings)


def load_model(
    folder: str | Path,
    *,
    inflation: InflationRule = "nearest",
    video: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **top: Any,
) -> LoadedModel:
    """The model of a folder that `save_model` wrote. Fields of `ModelConfig` override; another `num_frames` inflates.

    Raises WeightsError for a folder of another family or version, or weights that do not fit its settings.
    """
    state, settings = read_checkpoint(folder)
    found = {key: settings.get(key) for key in _OUR_FORMAT}
    if found != _OUR_FORMAT:
        raise WeightsError(
            f"{folder}/config.json is not of this project: expected {_OUR_FORMAT}, found {found}"
            f"{_hint(state)}"
        )
    try:
        config = ModelConfig.model_validate(settings.get("config"))
    except ValidationError as error:
        raise WeightsError(f"{folder}/config.json does not describe a model: {error}") from error
    model = VideoTextModel(config.replaced(video=video, text=text, **top))
    return LoadedModel(model.eval(), load_for_num_frames(model, state, inflation))


def _build(video: dict[str, Any], text: dict[str, Any], top: dict[str, Any]) -> VideoTextModel:
    return VideoTextModel(ModelConfig().replaced(video=video, text=text, **top))


def _read_official(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(source, Mapping):
        where, settings = "the given mapping", plain(source.get("config"))
        content = source["model"] if isinstance(source.get("model"), Mapping) else source
        state = tensors_of(content, where)
    else:
        where = str(source)
        state, settings = read_checkpoint(source)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    _refuse_other_family(state, "SViTT", where)
    return state, settings if isinstance(settings, dict) else {}


def _family(state: Mapping[str, Tensor]) -> str | None:
    """Which loader a state dict belongs to, by its keys."""
    keys = tuple(state)
    if any(key.startswith("text_decoder.") for key in keys):
        return "SViTT question answering"
    if any(key.startswith("vision_encoder.") for key in keys):
        return "SViTT"
    if any(key.startswith("video_encoder.") for key in keys):
        return "ours"
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in keys):
        return "BEiT" if any("relative_position_bias_table" in key for key in keys) else "another image model"
    if any(key.endswith("embeddings.word_embeddings.weight") for key in keys):
        return "BERT"
    return None


_LOADERS = {
    "SViTT": "load_official_svitt",
    "ours": "load_model",
    "BEiT": "load_hf_beit",
    "BERT": "load_hf_bert",
}


def _hint(state: Mapping[str, Tensor]) -> str:
    family = _family(state)
    if family in _LOADERS:
        return f"; its keys are those of {family}: use {_LOADERS[family]}"
    return (
        f"; its keys are those of {family or 'no family known here'} (such as {', '.join(sorted(state)[:3])})"
    )


def _refuse_other_family(state: Mapping[str, Tensor], wanted: str, where: str) -> None:
    if _family(state) != wanted:
        raise WeightsError(f"{where} is not a checkpoint of {wanted}{_hint(state)}")


def _check_text_settings(fields: dict[str, Any]) -> None:
    """Heads and special ids cannot be read from shapes: fill in BERT-base's, or ask for them."""
    if fields["vocab_size"] == _BERT_BASE_VOCABULARY:
        fields.update({key: value for key, value in _BERT_BASE_IDS.items() if key not in fields})
    missing = [key for key in ("num_heads", "cls_id", "mask_id") if key not in fields]
    if missing:
        raise WeightsError(
            f"{', '.join(missing)} cannot be read from weights of width {fields['width']} and vocabulary "
            f"{fields['vocab_size']}; give them, as in text={{{', '.join(f'{key!r}: ...' for key in missing)}}}"
        )


def _special_ids(folder: Path, given: dict[str, int | None], vocab_size: int) -> dict[str, int]:
    if (folder / "vocab.txt").is_file():
        words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        found = {"cls_id": "[CLS]", "mask_id": "[MASK]"}
        known = {key: words.index(word) for key, word in found.items() if word in words}
    else:
        known = _BERT_BASE_IDS if vocab_size == _BERT_BASE_VOCABULARY else {}
    ids = {**known, **{key: value for key, value in given.items() if value is not None}}
    if ids.keys() != given.keys():
        missing = sorted(given.keys() - ids.keys())
        raise WeightsError(
            f"{folder} has no vocab.txt that names [CLS] and [MASK]: give {', '.join(missing)}"
        )
    return ids
