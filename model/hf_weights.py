"""Hugging Face's BEiT and BERT under our names. Tensors and settings in and out: no files."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.errors import WeightsError
from model.official_weights import from_official, modern_norm_name

# What our layers are built with; a checkpoint of other values would load and give other features.
_BEIT_FIXED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "num_channels": 3,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": True,
    "use_shared_relative_position_bias": False,
    "use_mean_pooling": True,
}
_BERT_FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute"}
# transformers leaves values out of config.json that are its defaults, which differ from ours here.
_BEIT_DEFAULTS = {**_BEIT_FIXED, "use_relative_position_bias": False}
_NOT_OURS = ("classifier.", "mask_token", "lm_head.", "layernorm.")


def from_hf_beit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BEiT's keys under our names. Classifier, mask token and image-token head have no place here and are dropped."""
    official = {}
    for key, value in state.items():
        name = key.removeprefix("beit.")
        if not name.removeprefix("embeddings.").startswith(_NOT_OURS):
            official[f"vision_encoder.{name}"] = value
    return from_official(official)


def from_hf_bert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BERT's keys under our names. Pooler and next-sentence head have no place here and are dropped."""
    official = {}
    for key, value in state.items():
        name = modern_norm_name(key)
        if not name.startswith(("cls.", "bert.")):
            name = f"bert.{name}"
        if not name.startswith(("bert.pooler.", "cls.seq_relationship.")):
            official[f"text_encoder.{name}"] = value
    return from_official(official)


def beit_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `VideoConfig` from BEiT's config.json. Raises WeightsError for values that ours cannot have."""
    _check_fixed(settings, _BEIT_FIXED, _BEIT_DEFAULTS, "BEiT")
    return {"num_heads": settings["num_attention_heads"]} if "num_attention_heads" in settings else {}


def bert_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `TextConfig` from BERT's config.json. Raises WeightsError for values that ours cannot have."""
    _check_fixed(settings, _BERT_FIXED, _BERT_FIXED, "BERT")
    names = {"num_attention_heads": "num_heads", "pad_token_id": "pad_id", "hidden_dropout_prob": "dropout"}
    return {ours: settings[theirs] for theirs, ours in names.items() if theirs in settings}


def _check_fixed(
    settings: Mapping[str, Any], fixed: Mapping[str, Any], defaults: Mapping[str, Any], family: str
) -> None:
    other = {key: settings.get(key, defaults[key]) for key in fixed}
    wrong = [
        f"{key} {value!r} (must be {fixed[key]!r})" for key, value in other.items() if value != fixed[key]
    ]
    if wrong:
        raise WeightsError(
            f"config.json of {family} sets {', '.join(wrong)}, which this model does not have; "
            "take a checkpoint without"
        )
