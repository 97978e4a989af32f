"""Sizes of a model read from the shapes of its weights, under our names."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.errors import WeightsError
from model.relative_bias import CLS_ROWS

_VIDEO_LAYER = re.compile(r"^video_encoder\.layers\.(\d+)\.")
_TEXT_LAYER = re.compile(r"^text_encoder\.layers\.(\d+)\.")
_FUSION_LAYER = re.compile(r"^text_encoder\.layers\.(\d+)\.crossattention\.")
_BERT_HEAD_WIDTH = 64


def video_sizes(
    state: Mapping[str, Tensor], image_size: int | None = None, num_tokens: int | None = None
) -> dict[str, Any]:
    """Fields of `VideoConfig` that follow from shapes. Heads are the columns of the position tables.

    Frames and grid both hide in the rows of a table; `num_tokens` (side of its index buffer, CLS counted) or
    `image_size` tells them apart. Raises WeightsError when a key is missing or the rows fit no clip of that size.
    """
    patch = _shape(state, "video_encoder.patch_embed.weight")
    width, patch_size = patch[0], patch[-1]
    rows, num_heads = _shape(state, "video_encoder.layers.0.attention.bias_table")
    if num_tokens is not None:
        num_frames, grid = _clip_of_tokens(rows, num_tokens)
    else:
        num_frames, grid = _clip_of_image(rows, patch_size, image_size or 224)
    if image_size not in (None, grid * patch_size):
        raise WeightsError(
            f"the weights are for frames of {grid * patch_size} px, image_size says {image_size}; leave it out"
        )
    return {
        "num_frames": num_frames,
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "width": width,
        "depth": _count(state, _VIDEO_LAYER),
        "num_heads": num_heads,
        "mlp_ratio": _shape(state, "video_encoder.layers.0.mlp_in.weight")[0] / width,
    }


def text_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of `TextConfig` that follow from shapes; `num_heads` only where they are BERT's heads of 64.

    `fusion_layer` is the first layer with cross-attention, and is left out where there is none.
    """
    vocab_size, width = _shape(state, "text_encoder.embeddings.word_embeddings.weight")
    fields = {
        "vocab_size": vocab_size,
        "width": width,
        "depth": _count(state, _TEXT_LAYER),
        "mlp_ratio": _shape(state, "text_encoder.layers.0.intermediate.dense.weight")[0] / width,
        "max_length": _shape(state, "text_encoder.embeddings.position_embeddings.weight")[0],
    }
    fusion = [int(found[1]) for key in state if (found := _FUSION_LAYER.match(key))]
    if fusion:
        fields["fusion_layer"] = min(fusion)
    if width % _BERT_HEAD_WIDTH == 0:
        fields["num_heads"] = width // _BERT_HEAD_WIDTH
    return fields


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state:
        raise WeightsError(
            f"the weights have no {key}, from which a size is read; found {len(state)} keys, such as "
            f"{', '.join(sorted(state)[:3]) or 'none'}"
        )
    return tuple(state[key].shape)


def _count(state: Mapping[str, Tensor], layer: re.Pattern[str]) -> int:
    return 1 + max(int(found[1]) for key in state if (found := layer.match(key)))


def _clip_of_image(rows: int, patch_size: int, image_size: int) -> tuple[int, int]:
    grid = image_size // patch_size
    slots, rest = divmod(rows - CLS_ROWS, (2 * grid - 1) ** 2)
    if rest or slots % 2 == 0 or image_size % patch_size:
        fitting = [
            f"{(found + 1) // 2} frames of {side * patch_size} px"
            for side in range(2, 65)
            for found, left in [divmod(rows - CLS_ROWS, (2 * side - 1) ** 2)]
            if left == 0 and found % 2
        ]
        raise WeightsError(
            f"position tables of {rows} rows do not belong to frames of {image_size} px in patches of {patch_size}; "
            f"they fit {', '.join(fitting) or 'no square grid'}: state image_size"
        )
    return (slots + 1) // 2, grid


def _clip_of_tokens(rows: int, num_tokens: int) -> tuple[int, int]:
    for grid in range(1, num_tokens):
        num_frames, rest = divmod(num_tokens - 1, grid**2)
        if rest == 0 and (2 * num_frames - 1) * (2 * grid - 1) ** 2 + CLS_ROWS == rows:
            return num_frames, grid
    raise WeightsError(
        f"position tables of {rows} rows and an index of {num_tokens} tokens belong to no clip of square frames"
    )
