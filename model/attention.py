"""Attention of patches and CLS with relative position bias, dense or over selected blocks.

One function and its backends, which see the same keys, so that values and gradients agree:

* `reference`: all scores, mask, softmax, in this file; what the others are tested against;
* `blocks`: the selected keys only, in plain torch, recomputed in the backward pass (`attention_blocks`);
* `fused`: a compiled CPU kernel that also looks the bias up inside (`attention_fused`);
* `triton`: the same on a GPU (`attention_triton`).

Position codes. The table row of a query at (t, h, w) and a key at (t', h', w') is
((t-t'+T-1)(2H-1) + (h-h'+H-1))(2W-1) + (w-w'+W-1), which is code(query) - code(key) + centre with
code(t, h, w) = (t(2H-1) + h)(2W-1) + w. So one number a token replaces an N x N index, after pruning too.
The last three rows of the table are CLS to patch, patch to CLS, CLS to CLS.
"""

import functools
import importlib.util
import logging
import os
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from model.attention_blocks import attend_in_blocks, hidden
from model.attention_fused import FUSED_DTYPES, block_attention
from model.kernel_build import FusedUnavailableError, unavailable_reason, warn_if_unavailable
from model.sparsity import EdgeLayout

_LOG = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "blocks", "fused", "triton"]


class AttentionOutput(NamedTuple):
    """Mixed values, and the CLS query's attention to the patches (mean over heads, no gradient) if asked
    for.
    """

    values_BNAE: Float[Tensor, "B N A E"]
    cls_scores_BN: Float[Tensor, "B n"] | None


def token_codes(
    num_frames: int, height: int, width: int, device: torch.device | None = None
) -> Int[Tensor, " n"]:
    """Position code of every patch, frame by frame, row by row."""
    t, h, w = torch.meshgrid(
        torch.arange(num_frames, device=device),
        torch.arange(height, device=device),
        torch.arange(width, device=device),
        indexing="ij",
    )
    return ((t * (2 * height - 1) + h) * (2 * width - 1) + w).flatten()


def sparse_attention(
    qkv_BN3AE: Float[Tensor, "B N 3 A E"],
    codes: Int[Tensor, "*B n"],
    bias_table: Float[Tensor, "R A"],
    layout: EdgeLayout | None = None,
    key_mask: Bool[Tensor, "B N"] | None = None,
    *,
    backend: Backend = "auto",
    with_cls_scores: bool = False,
) -> AttentionOutput:
    """softmax(q k / sqrt(E) + bias) v over the keys that each query sees; token 0 is CLS.

    Queries, keys and values come as one tensor, as their projection leaves them. `codes` are (n,) when all
    samples hold the same patches, else (B, n), with N = n + 1. `layout` None is dense. `key_mask` is False at
    keys that nobody may see; CLS must be True. Raises ValueError for a layout of another length or a backend
    that cannot take this input, FusedUnavailableError when `fused` is asked for and cannot be built.
    """
    num_clips, num_tokens, _, num_heads, _ = qkv_BN3AE.shape
    num_patches = num_tokens - 1
    if layout is not None and layout.num_patches != num_patches:
        raise ValueError(f"layout is for {layout.num_patches} patches, got {num_patches}")
    num_scores = num_clips * num_heads * num_tokens**2
    chosen = choose_backend(qkv_BN3AE.device, qkv_BN3AE.dtype, num_scores, backend)
    if chosen == "reference":
        return _reference(qkv_BN3AE, codes, bias_table, layout, key_mask, with_cls_scores)
    if chosen == "blocks":
        out, cls_weights = attend_in_blocks(qkv_BN3AE, codes, bias_table, layout, key_mask)
    elif chosen == "triton":
        from model.attention_triton import attend_by_triton  # imports Triton, which CPU machines do not have

        out, cls_weights = attend_by_triton(qkv_BN3AE, codes, bias_table, layout, key_mask, with_cls_scores)
    else:
        blocks, size = (None, num_patches) if layout is None else (layout.key_blocks_SK, layout.block_size)
        out, _, cls_weights = block_attention(
            qkv_BN3AE, bias_table, codes, blocks, size, key_mask, with_cls_scores
        )
    return AttentionOutput(out, cls_weights.mean(dim=1) if with_cls_scores else None)


TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Up to so many scores (16 MiB) the plain form is faster than the one in parts: measured on 2 cores, B = 32, 4 heads of
# 24, 65 to 129 tokens.
_FEW_SCORES = 1 << 22


def choose_backend(device: torch.device, dtype: torch.dtype, num_scores: int, backend: Backend) -> Backend:
    """The backend that `auto` takes for an input with `num_scores` dense scores (B A N N), or the one asked for.

    Raises as `sparse_attention`.
    """
    # Tensors without data stand for those of the CPU; who means a GPU's says which backend.
    fits = device.type in ("cpu", "meta") and dtype in FUSED_DTYPES
    if backend == "auto":
        if fits and warn_if_unavailable():
            return "fused"
        if device.type == "cuda" and dtype in TRITON_DTYPES and _has_triton():
            return "triton"
        return "reference" if num_scores <= _FEW_SCORES else "blocks"
    if backend == "fused" and not fits:
        raise ValueError(
            f"attention_backend fused takes float32 or bfloat16 on the CPU, got {dtype} on {device}; "
            "set attention_backend: auto"
        )
    if backend == "fused" and (reason := unavailable_reason()) is not None:
        raise FusedUnavailableError(f"attention_backend fused cannot be had: {reason}; set it to auto")
    if backend == "triton":
        _require_triton(device, dtype)
    return backend


# Under torch.compile the choice is made once, while tracing. This is the mark of torch.compiler.assume_constant_result,
# which itself imports the compiler: 1.2 s of every process.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _has_triton() -> bool:
    has_it = importlib.util.find_spec("triton") is not None
    if not has_it:
        _LOG.warning(
            "no package triton here: attention on the GPU runs in plain torch, many times slower; torch's builds for "
            "GPUs bring it along, so install torch again"
        )
    return has_it


def _require_triton(device: torch.device, dtype: torch.dtype) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("attention_backend triton needs the package triton; set attention_backend: auto")
    # Tensors without data need no GPU: a plan for one is made anywhere.
    runs = device.type in ("cuda", "meta") or os.environ.get("TRITON_INTERPRET") == "1"
    if not runs or dtype not in TRITON_DTYPES:
        raise ValueError(
            f"attention_backend triton takes float32, float16 or bfloat16 on a GPU, got {dtype} on {device}; "
            "set attention_backend: auto"
        )


def _reference(
    qkv_BN3AE: Tensor,
    codes: Tensor,
    bias_table: Tensor,
    layout: EdgeLayout | None,
    key_mask: Tensor | None,
    with_cls_scores: bool,
) -> AttentionOutput:
    # Heads first: that is how the bias is stored.
    q_ABNE, k_ABNE, v_ABNE = qkv_BN3AE.permute(2, 3, 0, 1, 4)
    scores_ABNN = (q_ABNE * q_ABNE.shape[-1] ** -0.5) @ k_ABNE.transpose(-1, -2)
    bias = bias_table.T[:, _table_rows(codes, bias_table.shape[0])]
    scores_ABNN = scores_ABNN + (bias if codes.dim() == 2 else bias.unsqueeze(1))
    if layout is not None:
        scores_ABNN = scores_ABNN + hidden(layout.dense_mask(), scores_ABNN)
    if key_mask is not None:
        scores_ABNN = scores_ABNN + hidden(key_mask[:, None], scores_ABNN)
    weights_ABNN = scores_ABNN.softmax(dim=-1)
    cls_scores = weights_ABNN.detach()[:, :, 0, 1:].mean(dim=0) if with_cls_scores else None
    return AttentionOutput((weights_ABNN @ v_ABNE).permute(1, 2, 0, 3), cls_scores)


def _table_rows(codes: Tensor, num_rows: int) -> Tensor:
    """Table row of every (query, key) pair, CLS first: (N, N), or (B, N, N) for codes of each sample."""
    patches = codes.unsqueeze(-1) - codes.unsqueeze(-2) + (num_rows - 4) // 2
    rows = functional.pad(patches, (1, 0, 1, 0), value=num_rows - 2)
    rows[..., 0, 1:] = num_rows - 3
    rows[..., 0, 0] = num_rows - 1
    return rows
