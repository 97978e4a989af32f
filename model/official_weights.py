"""Key names and settings of the published SViTT code, to ours and back. Tensors in, tensors out: no files.

Query, key and value matrices of the video encoder are one tensor here and three there. Index buffers and the tied
MLM decoder are computed, so they are left out.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.errors import WeightsError

# Official prefix, our prefix. Of a layer of the video encoder, and of everything else.
_VIDEO_LAYER = (
    ("layernorm_before.", "attention_norm."),
    ("layernorm_after.", "mlp_norm."),
    ("lambda_1", "attention_scale"),
    ("lambda_2", "mlp_scale"),
    ("attention.attention.query.bias", "attention.q_bias"),
    ("attention.attention.value.bias", "attention.v_bias"),
    ("attention.attention.relative_position_bias.relative_position_bias_table", "attention.bias_table"),
    ("attention.output.dense.", "attention.output."),
    ("intermediate.dense.", "mlp_in."),
    ("output.dense.", "mlp_out."),
)
_REST = (
    ("vision_encoder.embeddings.cls_token", "video_encoder.cls_token"),
    ("vision_encoder.embeddings.patch_embeddings.projection.", "video_encoder.patch_embed."),
    ("vision_encoder.pooler.layernorm.", "video_encoder.pooled_norm."),
    ("vision_layernorm.", "video_norm."),
    ("text_encoder.bert.embeddings.", "text_encoder.embeddings."),
    ("text_encoder.bert.encoder.layer.", "text_encoder.layers."),
    ("text_encoder.cls.predictions.transform.", "text_encoder.mlm_head.transform."),
    ("text_encoder.cls.predictions.bias", "text_encoder.mlm_head.decoder.bias"),
    ("vision_proj.", "video_projection."),
    ("text_proj.", "text_projection."),
    ("itm_head.", "vtm_head."),
    ("temp", "learned_temperature"),
)
_DERIVED = re.compile(r"relative_position_index$|position_ids$|cls\.predictions\.decoder\.(weight|bias)$")
_OFFICIAL_LAYER = re.compile(r"^vision_encoder\.encoder\.layer\.(\d+)\.")
_OUR_LAYER = re.compile(r"^video_encoder\.layers\.(\d+)\.")
_QKV = ("query", "key", "value")
_QKV_PART = re.compile(_OFFICIAL_LAYER.pattern + r"attention\.attention\.(query|key|value)\.weight$")


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the published code under our names.

    Retrieval models, which leave `bert.` out of their text keys, and norms with the old names `gamma` and `beta` are
    understood. Keys that are not known keep their name, for strict loading to report. Raises WeightsError for a layer
    that has only some of query, key and value.
    """
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if _DERIVED.search(key):
            continue
        if found := _QKV_PART.match(key):
            parts.setdefault(found[1], {})[found[2]] = value
            continue
        name = _our_name(modern_norm_name(key))
        ours[name] = value.reshape(1) if name == "learned_temperature" else value
    for layer, qkv in parts.items():
        if len(qkv) < len(_QKV):
            raise WeightsError(
                f"layer {layer} of the video encoder has only {sorted(qkv)} of query, key, value; "
                "the checkpoint is not complete"
            )
        weight = torch.cat([qkv[name] for name in _QKV])
        ours[f"video_encoder.layers.{layer}.attention.qkv_weight"] = weight
    return ours


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours (or gradients by its names) under the published names, without derived entries.

    Raises WeightsError for keys that the published model does not have (time and place embeddings).
    """
    official: dict[str, Tensor] = {}
    for key, value in state.items():
        if found := _OUR_LAYER.match(key):
            prefix = f"vision_encoder.encoder.layer.{found[1]}."
            rest = key[found.end() :]
            if rest == "attention.qkv_weight":
                for name, part in zip(_QKV, value.chunk(3), strict=True):
                    official[f"{prefix}attention.attention.{name}.weight"] = part
                continue
            renamed = _renamed(rest, _VIDEO_LAYER, backwards=True)
            renamed = None if renamed is None else prefix + renamed
        else:
            renamed = _renamed(key, _REST, backwards=True)
        if renamed is None:
            raise WeightsError(f"{key} has no name in the published model")
        official[renamed] = value.reshape(()) if renamed == "temp" else value
    return official


def modern_norm_name(key: str) -> str:
    """`LayerNorm.gamma` and `.beta` of old BERT checkpoints as `weight` and `bias`."""
    return re.sub(
        r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
    )


def _our_name(key: str) -> str:
    if found := _OFFICIAL_LAYER.match(key):
        renamed = _renamed(key[found.end() :], _VIDEO_LAYER)
        return key if renamed is None else f"video_encoder.layers.{found[1]}.{renamed}"
    key = re.sub(r"^text_encoder\.(embeddings|encoder)\.", r"text_encoder.bert.\1.", key)
    return _renamed(key, _REST) or key


def _renamed(key: str, pairs: tuple[tuple[str, str], ...], backwards: bool = False) -> str | None:
    for official, ours in pairs:
        old, new = (ours, official) if backwards else (official, ours)
        # A prefix that ends in a dot names a module, any other one a whole key.
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key[len(old) :]
    return None


_VIDEO_SETTINGS = {
    "token_keep_rate": "keep_rate",
    "token_keep_strategy": "prune_score",
    "token_drop_loc": "prune_layers",
    "sparse_local_attn": "num_local_blocks",
    "sparse_random_attn": "num_random_blocks",
    "attn_block_size": "block_size",
    "token_3d_order": "token_order",
}
_TEXT_SETTINGS = {
    "token_keep_rate": "multimodal_keep_rate",
    "token_keep_strategy": "multimodal_score",
    "token_drop_loc": "multimodal_prune_layers",
}


def settings_from_official(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `VideoConfig` and of `ModelConfig` from `vision_encoder_args` and `text_encoder_args` as published.

    Raises WeightsError for fields that would change the model and are not known here. `joint_encoder_args` is passed
    over, as the published code does: no multimodal pruning follows from it.
    """
    video = _translated(settings.get("vision_encoder_args") or {}, _VIDEO_SETTINGS, "vision_encoder_args")
    top = _translated(settings.get("text_encoder_args") or {}, _TEXT_SETTINGS, "text_encoder_args")
    if video.get("token_order") == "none":
        video["token_order"] = "raster"
    return video, top


def _translated(given: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    given = {key: value for key, value in given.items() if (key, value) != ("num_cls_tokens", 1)}
    unknown = sorted(given.keys() - names.keys())
    if unknown:
        raise WeightsError(
            f"{where} sets {', '.join(f'{key}={given[key]!r}' for key in unknown)}, which this model does not know; "
            f"known are {', '.join(names)}. Leave them out to load the weights without them"
        )
    fields = {names[key]: value for key, value in given.items()}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
