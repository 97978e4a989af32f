"""Arithmetic of the model's size and cost from plain numbers; no tensors. Counts are multiply-accumulates
(MACs).
"""

from math import ceil


def keep_count(num_tokens: int, keep_rate: float) -> int:
    """Tokens that survive pruning: ceil(keep_rate * num_tokens), the product in double precision."""
    return ceil(keep_rate * num_tokens)


def video_layer_macs(
    num_patches: int, width: int, mlp_width: int, num_blocks: int, block_size: int, key_blocks: int
) -> int:
    """MACs of one video layer on `num_patches` alive patches plus CLS.

    `num_blocks` 0 means dense attention; otherwise `key_blocks` = local + random blocks per query block.
    """
    tokens = num_patches + 1
    linear = 4 * tokens * width**2 + 2 * tokens * width * mlp_width
    if num_blocks == 0:
        return linear + 2 * tokens**2 * width
    keys = 1 + key_blocks * block_size
    return linear + 2 * tokens * width + 2 * num_blocks * block_size * keys * width


def text_layer_macs(num_tokens: int, width: int, mlp_width: int) -> int:
    """MACs of one BERT layer on `num_tokens` text tokens."""
    linear = 4 * num_tokens * width**2 + 2 * num_tokens * width * mlp_width
    return linear + 2 * num_tokens**2 * width


def cross_attention_macs(text_tokens: int, video_tokens: int, width: int, video_width: int) -> int:
    """MACs of the cross-attention of a fusion layer; `video_tokens` includes CLS."""
    linear = 2 * text_tokens * width**2 + 2 * video_tokens * video_width * width
    return linear + 2 * text_tokens * video_tokens * width


def video_parameters(
    depth: int, width: int, mlp_width: int, num_heads: int, table_rows: int, patch_values: int
) -> int:
    """Parameters of the video encoder, its pooling norm and the norm in front of the fusion layers."""
    attention = 4 * width**2 + 3 * width + table_rows * num_heads
    mlp = 2 * width * mlp_width + mlp_width + width
    norms_and_scales = 6 * width
    embedding = patch_values * width + 2 * width
    return embedding + depth * (attention + mlp + norms_and_scales) + 4 * width


def text_parameters(
    depth: int, num_fusion: int, width: int, mlp_width: int, vocabulary: int, positions: int, video_width: int
) -> int:
    """Parameters of text encoder, fusion layers and MLM head (its decoder is tied to the word embeddings)."""
    embedding = (vocabulary + positions + 2) * width + 2 * width
    attention = 4 * (width**2 + width) + 2 * width
    cross = 2 * (width**2 + width) + 2 * (video_width * width + width) + 2 * width
    mlp = 2 * width * mlp_width + mlp_width + 3 * width
    head = width**2 + 3 * width + vocabulary
    return embedding + depth * (attention + mlp) + num_fusion * cross + head
