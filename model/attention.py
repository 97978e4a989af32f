"""Attention of patches and CLS with relative position bias, dense or over selected blocks.

Two backends of one signature: `reference` (readable: all scores, mask, softmax) and `gather` (only the
selected blocks). Both see the same keys, so values and gradients agree. Inside, heads come first: that is how
the bias is stored, and the caller's tensors may be views of such memory.

Position codes. The table row of a query at (t, h, w) and a key at (t', h', w') is
((t-t'+T-1)(2H-1) + (h-h'+H-1))(2W-1) + (w-w'+W-1), which is code(query) - code(key) + centre with
code(t, h, w) = (t(2H-1) + h)(2W-1) + w. So one number a token replaces an N x N index, after pruning too.
The last three rows of the table are CLS to patch, patch to CLS, CLS to CLS.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from model.sparsity import EdgeLayout

Backend = Literal["auto", "reference", "gather"]


class AttentionOutput(NamedTuple):
    """Mixed values, and the CLS query's attention to the patches (mean over heads, no gradient) if asked
    for.
    """

    values_BANE: Float[Tensor, "B A N E"]
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
    q_BANE: Float[Tensor, "B A N E"],
    k_BANE: Float[Tensor, "B A N E"],
    v_BANE: Float[Tensor, "B A N E"],
    codes: Int[Tensor, "*B n"],
    bias_table: Float[Tensor, "R A"],
    layout: EdgeLayout | None = None,
    key_mask: Bool[Tensor, "B N"] | None = None,
    *,
    backend: Backend = "auto",
    with_cls_scores: bool = False,
) -> AttentionOutput:
    """softmax(q k / sqrt(E) + bias) v over the keys that each query sees; token 0 is CLS.

    `codes` are (n,) when all samples hold the same patches, else (B, n), with N = n + 1. `layout` None is
    dense. `key_mask` is False at keys that nobody may see; CLS must be True. Returns values and CLS scores.
    """
    if layout is not None and layout.num_patches != q_BANE.shape[2] - 1:
        raise ValueError(f"layout is for {layout.num_patches} patches, got {q_BANE.shape[2] - 1}")
    use_gather = layout is not None and (
        backend == "gather" or (backend == "auto" and _gather_is_faster(layout, q_BANE.shape[2]))
    )
    if layout is not None and use_gather:
        return _gather(q_BANE, k_BANE, v_BANE, codes, bias_table, layout, key_mask, with_cls_scores)
    return _reference(q_BANE, k_BANE, v_BANE, codes, bias_table, layout, key_mask, with_cls_scores)


def _gather_is_faster(layout: EdgeLayout, num_tokens: int) -> bool:
    # Copying the selected keys pays only where most of them are left out.
    return 3 * layout.keys_per_query < num_tokens


def _reference(
    q_BANE: Tensor,
    k_BANE: Tensor,
    v_BANE: Tensor,
    codes: Tensor,
    bias_table: Tensor,
    layout: EdgeLayout | None,
    key_mask: Tensor | None,
    with_cls_scores: bool,
) -> AttentionOutput:
    q_ABNE, k_ABNE, v_ABNE = q_BANE.transpose(0, 1), k_BANE.transpose(0, 1), v_BANE.transpose(0, 1)
    scores_ABNN = (q_ABNE * q_BANE.shape[-1] ** -0.5) @ k_ABNE.transpose(-1, -2)
    scores_ABNN += _lookup(bias_table, _dense_rows(codes, bias_table.shape[0]))
    if layout is not None:
        scores_ABNN += _hidden(layout.dense_mask(), scores_ABNN)
    if key_mask is not None:
        scores_ABNN += _hidden(key_mask[:, None], scores_ABNN)
    weights_ABNN = scores_ABNN.softmax(dim=-1)
    cls_scores = weights_ABNN.detach()[:, :, 0, 1:].mean(dim=0) if with_cls_scores else None
    return AttentionOutput((weights_ABNN @ v_ABNE).transpose(0, 1), cls_scores)


def _gather(
    q_BANE: Tensor,
    k_BANE: Tensor,
    v_BANE: Tensor,
    codes: Tensor,
    bias_table: Tensor,
    layout: EdgeLayout,
    key_mask: Tensor | None,
    with_cls_scores: bool,
) -> AttentionOutput:
    num_clips, num_heads, num_tokens, head_width = q_BANE.shape
    num_blocks, size = layout.num_blocks, layout.block_size
    tokens_SW, valid_SW = layout.token_index()
    num_keys = tokens_SW.shape[1]
    # Heads and clips as one axis, heads first.
    q_XNE, k_XNE, v_XNE = (x.transpose(0, 1).flatten(0, 1) for x in (q_BANE, k_BANE, v_BANE))
    q_XNE = q_XNE * head_width**-0.5

    padding = num_blocks * size - (num_tokens - 1)
    q_blocks = functional.pad(q_XNE[:, 1:], (0, 0, 0, padding)).reshape(-1, size, head_width)
    k_blocks = k_XNE.index_select(1, tokens_SW.flatten()).view(-1, num_keys, head_width)
    v_blocks = v_XNE.index_select(1, tokens_SW.flatten()).view(-1, num_keys, head_width)
    scores = torch.bmm(q_blocks, k_blocks.transpose(1, 2))
    scores_ABSGW = scores.view(num_heads, num_clips, num_blocks, size, num_keys)
    scores_ABSGW += _lookup(bias_table, _block_rows(codes, tokens_SW, padding, bias_table.shape[0]), 3)
    scores_ABSGW += _hidden(valid_SW[:, None], scores_ABSGW)
    if key_mask is not None:
        scores_ABSGW += _hidden(key_mask[:, tokens_SW].unsqueeze(2), scores_ABSGW)
    mixed = torch.bmm(scores_ABSGW.softmax(dim=-1).view(-1, size, num_keys), v_blocks)
    mixed_XNE = mixed.view(-1, num_blocks * size, head_width)[:, : num_tokens - 1]

    cls_bias_AN = torch.cat([bias_table[-1:], bias_table[-3:-2].expand(num_tokens - 1, -1)]).T
    cls_logits_XN = torch.bmm(q_XNE[:, :1], k_XNE.transpose(1, 2)).squeeze(1)
    cls_logits_ABN = cls_logits_XN.view(num_heads, num_clips, -1) + cls_bias_AN[:, None]
    if key_mask is not None:
        cls_logits_ABN += _hidden(key_mask, cls_logits_ABN)
    cls_weights_ABN = cls_logits_ABN.softmax(dim=-1)
    cls_mixed_X1E = torch.bmm(cls_weights_ABN.view(-1, 1, num_tokens), v_XNE)
    cls_scores = cls_weights_ABN.detach()[:, :, 1:].mean(dim=0) if with_cls_scores else None
    mixed_XNE = torch.cat([cls_mixed_X1E, mixed_XNE], dim=1)
    return AttentionOutput(mixed_XNE.unflatten(0, (num_heads, num_clips)).transpose(0, 1), cls_scores)


def _hidden(seen: Tensor, scores: Tensor) -> Tensor:
    """0 where a key is seen, -inf where not. Added, because unlike a fill that costs nothing in the backward
    pass.
    """
    return torch.zeros_like(seen, dtype=scores.dtype).masked_fill_(~seen, float("-inf"))


def _lookup(bias_table: Tensor, rows: Tensor, trailing: int = 2) -> Tensor:
    """Bias of every (query, key), heads first: (A, 1, ...) for shared rows, (A, B, ...) for rows of each
    clip.
    """
    # One head after the other: both the lookup and its index_add in the backward pass then run along memory.
    bias = bias_table.T.contiguous().index_select(1, rows.flatten()).view(-1, *rows.shape)
    return bias.unsqueeze(1) if rows.dim() == trailing else bias


def _dense_rows(codes: Tensor, num_rows: int) -> Tensor:
    """Table row of every (query, key) pair, CLS first: (N, N), or (B, N, N) for codes of each sample."""
    patches = codes.unsqueeze(-1) - codes.unsqueeze(-2) + (num_rows - 4) // 2
    rows = functional.pad(patches, (1, 0, 1, 0), value=num_rows - 2)
    rows[..., 0, 1:] = num_rows - 3
    rows[..., 0, 0] = num_rows - 1
    return rows


def _block_rows(codes: Tensor, tokens_SW: Tensor, padding: int, num_rows: int) -> Tensor:
    """Table row of every patch query and gathered key: (S, G, W), or (B, S, G, W) for codes of each
    sample.
    """
    num_blocks = tokens_SW.shape[0]
    # Padded queries and CLS borrow code 0; the first are dropped afterwards, the second is set below.
    queries = functional.pad(codes, (0, padding)).unflatten(-1, (num_blocks, -1)).unsqueeze(-1)
    keys = functional.pad(codes, (1, 0))[..., tokens_SW].unsqueeze(-2)
    rows = (queries - keys + (num_rows - 4) // 2).clamp_(0, num_rows - 4)
    rows[..., 0] = num_rows - 2
    return rows
