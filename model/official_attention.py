"""Block attention as the published SViTT code computes it, its quirks as flags; for parity and released weights.

Written to be read. Nothing here is fast: training uses `attention`, which is the corrected form of the same thing.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from model.attention import AttentionOutput
from model.relative_bias import CLS_TO_CLS, CLS_TO_PATCH, patch_query_rows
from model.sparsity import EdgeLayout


def official_attention(
    qkv_BN3AE: Float[Tensor, "B N 3 A E"],
    codes: Int[Tensor, "*B n"],
    bias_table: Float[Tensor, "R A"],
    layout: EdgeLayout,
    num_local: int,
    *,
    padded_keys_unmasked: bool = True,
    value_and_bias_block_mirrored: bool = True,
    with_cls_scores: bool = False,
) -> AttentionOutput:
    """softmax(q k / sqrt(E) + bias) v over CLS and the listed blocks; token 0 is CLS, which sees everything.

    The first `num_local` columns of `layout` are the local window. A block that is listed twice counts twice.
    `padded_keys_unmasked`: the zeros that fill the last block up take part, with score 0 plus the patch-to-CLS bias
    and value 0, so attention leaks into them. `value_and_bias_block_mirrored`: the key block of local offset r comes
    with the values and the bias of offset -r. Both False is `sparse_attention`. Places of -1 are never seen.
    """
    num_tokens = qkv_BN3AE.shape[1]
    q_BANE, k_BANE, v_BANE = qkv_BN3AE.permute(2, 0, 3, 1, 4)
    q_BANE = q_BANE * q_BANE.shape[-1] ** -0.5
    key_blocks_SK = layout.key_blocks_SK
    value_blocks_SK = key_blocks_SK
    if value_and_bias_block_mirrored:
        value_blocks_SK = torch.cat(
            [key_blocks_SK[:, :num_local].flip(1), key_blocks_SK[:, num_local:]], dim=1
        )

    q_BASGE = _cut_into_blocks(q_BANE[:, :, 1:], layout)
    k_BASWE = _with_cls(k_BANE, key_blocks_SK, layout)
    v_BASWE = _with_cls(v_BANE, value_blocks_SK, layout)
    scores_BASGW = q_BASGE @ k_BASWE.transpose(-1, -2) + _bias(codes, value_blocks_SK, layout, bias_table)
    hidden_SW = _hidden_keys(layout, padded_keys_unmasked)
    weights_BASGW = scores_BASGW.masked_fill(hidden_SW[:, None], float("-inf")).softmax(dim=-1)
    mixed_BANE = (weights_BASGW @ v_BASWE).flatten(2, 3)[:, :, : num_tokens - 1]

    cls_bias_AN = bias_table[CLS_TO_PATCH, :, None].repeat(1, num_tokens)
    cls_bias_AN[:, 0] = bias_table[CLS_TO_CLS]
    cls_weights_BA1N = (q_BANE[:, :, :1] @ k_BANE.transpose(-1, -2) + cls_bias_AN[:, None]).softmax(dim=-1)
    cls_scores_BN = cls_weights_BA1N.detach()[:, :, 0, 1:].mean(dim=1) if with_cls_scores else None
    mixed_BANE = torch.cat([cls_weights_BA1N @ v_BANE, mixed_BANE], dim=2)
    return AttentionOutput(mixed_BANE.transpose(1, 2), cls_scores_BN)


def _cut_into_blocks(patches: Tensor, layout: EdgeLayout) -> Tensor:
    """(B, A, n, E) to (B, A, S, G, E), the last block filled up with zeros."""
    padding = layout.num_blocks * layout.block_size - layout.num_patches
    return functional.pad(patches, (0, 0, 0, padding)).unflatten(2, (layout.num_blocks, layout.block_size))


def _with_cls(tokens_BANE: Tensor, blocks_SK: Tensor, layout: EdgeLayout) -> Tensor:
    """CLS and the tokens of the listed blocks, for every query block: (B, A, S, W, E)."""
    chosen = _cut_into_blocks(tokens_BANE[:, :, 1:], layout)[:, :, blocks_SK].flatten(3, 4)
    cls = tokens_BANE[:, :, None, :1].expand(-1, -1, layout.num_blocks, -1, -1)
    return torch.cat([cls, chosen], dim=3)


def _bias(codes: Tensor, blocks_SK: Tensor, layout: EdgeLayout, bias_table: Tensor) -> Tensor:
    """Bias of every patch query and key of its blocks, (A, S, G, W) or (B, A, S, G, W). Padding counts as CLS."""
    padding = layout.num_blocks * layout.block_size - layout.num_patches
    codes_SG = functional.pad(codes, (0, padding)).unflatten(-1, (layout.num_blocks, layout.block_size))
    place_SG = torch.arange(layout.num_blocks * layout.block_size, device=codes.device)
    is_padding_SG = (place_SG >= layout.num_patches).view(layout.num_blocks, layout.block_size)
    key_codes_SW = functional.pad(codes_SG[..., blocks_SK, :].flatten(-2), (1, 0))
    key_is_cls_SW = functional.pad(is_padding_SG[blocks_SK].flatten(-2), (1, 0), value=True)
    rows = patch_query_rows(codes_SG, key_codes_SW, key_is_cls_SW, bias_table.shape[0])
    # Queries of the padding have no code; what they mix is dropped.
    return bias_table[rows.clamp(min=0, max=bias_table.shape[0] - 1)].movedim(-1, -4)


def _hidden_keys(layout: EdgeLayout, padded_keys_unmasked: bool) -> Tensor:
    """True at keys that nobody sees: unused places, and the padding unless it takes part. (S, W), CLS first."""
    if not padded_keys_unmasked:
        return ~layout.token_index()[1]
    unused_SK = layout.key_blocks_SK < 0
    return functional.pad(unused_SK.repeat_interleave(layout.block_size, dim=1), (1, 0), value=False)
