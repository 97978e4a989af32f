"""Block-sparse attention on a GPU by Triton kernels, as a torch op with gradient.

Patches: one program for each query block (forward, gradient of queries and table) or key block (gradient of keys and
values), scores in registers, the bias looked up by position code. CLS, which sees all and is seen by all, has programs
of its own, one a clip and head. Nothing is gathered, copied or materialised: the kernels read one tensor of queries,
keys and values as their projection leaves it, and write one gradient of the same shape.

Many pairs share a row of the table, so its gradient is added up by atomics, in 64-bit fixed point: sums of integers do
not depend on their order, and a run repeats to the last bit.

Imported only where it is taken, as it needs Triton, which torch brings along on GPU machines. Elsewhere the tests run
the same kernels in Triton's interpreter.
"""

# Triton's language is Python to look at only: names are rebound to tensors, pointers are added to.
# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.sparsity import EdgeLayout

# Tiles of tl.dot are powers of two and no smaller.
_LEAST_TILE = 16
# Dense attention is cut into blocks of this size; CLS goes over the tokens in pieces of it.
_DENSE_BLOCK = 64
# Bits of the fixed point's largest sum: one of 64 is the sign, one is spare.
_SUM_BITS = 62


def attend_by_triton(
    qkv_BN3AE: Float[Tensor, "B N 3 A E"],
    codes: Int[Tensor, "*B n"],
    bias_table: Float[Tensor, "R A"],
    layout: EdgeLayout | None,
    key_mask: Bool[Tensor, "B N"] | None,
    with_cls_weights: bool,
) -> tuple[Float[Tensor, "B N A E"], Float[Tensor, "B A n"]]:
    """Mixed values, and the CLS query's weights on the patches (no gradient; empty unless asked for). Arguments as
    `sparse_attention`.
    """
    if layout is None:
        num_patches = qkv_BN3AE.shape[1] - 1
        everything = torch.arange(-(-num_patches // _DENSE_BLOCK), device=qkv_BN3AE.device)
        layout = EdgeLayout(everything.expand(len(everything), -1), _DENSE_BLOCK, num_patches)
    out, _, cls_weights = triton_attention(
        qkv_BN3AE, bias_table, codes, layout.key_blocks_SK, layout.block_size, key_mask, with_cls_weights
    )
    return out, cls_weights


@triton.jit
def _rows(base, tokens, columns, valid, stride, WIDTH: tl.constexpr):
    """Rows of a token tensor, zero where not valid: (tile, E)."""
    at = base + tokens[:, None] * stride + columns[None, :]
    return tl.load(at, mask=valid[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _row(base, columns, WIDTH: tl.constexpr):
    return tl.load(base + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _seen_keys(mask, tokens, valid, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        valid = valid & (tl.load(mask + tokens, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _scores_of(q, k, code_q, code_k, seen, table, centre, scale, PRECISION: tl.constexpr):
    """Scores of a tile, -inf where not seen, and the table rows they took their bias from."""
    rows = code_q[:, None] - code_k[None, :] + centre
    bias = tl.load(table + rows, mask=seen, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    return tl.where(seen, scores, float("-inf")), rows


@triton.jit
def _scores_of_cls(q_cls, k, tokens, seen, table, num_rows, scale):
    """Scores of the CLS query on a piece of tokens, CLS first, -inf where not seen."""
    scores = tl.sum(k.to(tl.float32) * q_cls[None, :], axis=1) * scale
    scores += tl.load(table + tl.where(tokens == 0, num_rows - 1, num_rows - 3))
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _add_fixed(sums, rows, values, per_unit, mask):
    """Adds to sums kept in whole units, of which `per_unit` make 1."""
    tl.atomic_add(sums + rows, (values * per_unit).to(tl.int64), mask=mask, sem="relaxed")


@triton.jit
def _forward(
    qkv_ptr, table_ptr, codes_ptr, blocks_ptr, mask_ptr, out_ptr, lse_ptr,
    stride_clip, stride_token, stride_part, stride_head, codes_stride,
    num_patches, num_heads, num_rows, num_slots, scale,
    SIZE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1) % num_heads
    # 64 bits: a large batch holds more than 2^31 values.
    clip = (tl.program_id(1) // num_heads).to(tl.int64)
    place, columns = tl.arange(0, TILE), tl.arange(0, WIDTH_TILE)
    q_base = qkv_ptr + clip * stride_clip + head * stride_head
    k_base, v_base = q_base + stride_part, q_base + 2 * stride_part
    table, codes = table_ptr + head * num_rows, codes_ptr + clip * codes_stride
    mask = mask_ptr + clip * (num_patches + 1)
    centre = (num_rows - 4) // 2

    queries = block * SIZE + place
    valid_q = (place < SIZE) & (queries < num_patches)
    q = _rows(q_base, 1 + queries, columns, valid_q, stride_token, WIDTH)
    code_q = tl.load(codes + queries, mask=valid_q, other=0)

    # CLS, the key that every query sees, opens the running softmax.
    top = tl.sum(q.to(tl.float32) * _row(k_base, columns, WIDTH)[None, :], axis=1) * scale
    top += tl.load(table + num_rows - 2)
    total = tl.full((TILE,), 1.0, tl.float32)
    mixed = tl.zeros((TILE, WIDTH_TILE), tl.float32) + _row(v_base, columns, WIDTH)[None, :]
    for slot in range(num_slots):
        key_block = tl.load(blocks_ptr + block * num_slots + slot).to(tl.int32)
        if key_block >= 0:
            keys = key_block * SIZE + place
            valid_k = _seen_keys(mask, 1 + keys, (place < SIZE) & (keys < num_patches), HAS_MASK)
            k = _rows(k_base, 1 + keys, columns, valid_k, stride_token, WIDTH)
            v = _rows(v_base, 1 + keys, columns, valid_k, stride_token, WIDTH)
            code_k = tl.load(codes + keys, mask=valid_k, other=0)
            seen = valid_q[:, None] & valid_k[None, :]
            scores, _ = _scores_of(q, k, code_q, code_k, seen, table, centre, scale, PRECISION)
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp(scores - new_top[:, None])
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(weights, axis=1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            top = new_top
    out = out_ptr + clip * (num_patches + 1) * num_heads * WIDTH + head * WIDTH
    at = out + (1 + queries)[:, None] * (num_heads * WIDTH) + columns[None, :]
    mixed = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(at, mixed, mask=valid_q[:, None] & (columns < WIDTH)[None, :])
    lse = lse_ptr + (clip * num_heads + head) * (num_patches + 1)
    tl.store(lse + 1 + queries, top + tl.log(total), mask=valid_q)


@triton.jit
def _forward_cls(
    qkv_ptr, table_ptr, mask_ptr, out_ptr, lse_ptr, weights_ptr,
    stride_clip, stride_token, stride_part, stride_head, num_patches, num_heads, num_rows, scale,
    PIECE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr,
    HAS_MASK: tl.constexpr, WITH_WEIGHTS: tl.constexpr,
):  # fmt: skip
    head, clip = tl.program_id(0) % num_heads, (tl.program_id(0) // num_heads).to(tl.int64)
    place, columns, one = tl.arange(0, PIECE), tl.arange(0, WIDTH_TILE), tl.arange(0, 1)
    q_base = qkv_ptr + clip * stride_clip + head * stride_head
    k_base, v_base = q_base + stride_part, q_base + 2 * stride_part
    table, mask = table_ptr + head * num_rows, mask_ptr + clip * (num_patches + 1)
    q_cls = _row(q_base, columns, WIDTH)

    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    mixed = tl.zeros((WIDTH_TILE,), tl.float32)
    for start in range(0, num_patches + 1, PIECE):
        tokens = start + place
        seen = _seen_keys(mask, tokens, tokens <= num_patches, HAS_MASK)
        k = _rows(k_base, tokens, columns, seen, stride_token, WIDTH)
        v = _rows(v_base, tokens, columns, seen, stride_token, WIDTH).to(tl.float32)
        scores = _scores_of_cls(q_cls, k, tokens, seen, table, num_rows, scale)
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp(scores - new_top)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        mixed = mixed * shrink + tl.sum(weights[:, None] * v, axis=0)
        top = new_top
    lse = top + tl.log(total)
    out = out_ptr + clip * (num_patches + 1) * num_heads * WIDTH + head * WIDTH
    tl.store(out + columns, (mixed / total).to(out_ptr.dtype.element_ty), mask=columns < WIDTH)
    tl.store(lse_ptr + (clip * num_heads + head) * (num_patches + 1) + one, lse)
    if WITH_WEIGHTS:
        weights_base = weights_ptr + (clip * num_heads + head) * num_patches
        for start in range(0, num_patches + 1, PIECE):
            tokens = start + place
            inside = tokens <= num_patches
            seen = _seen_keys(mask, tokens, inside, HAS_MASK)
            k = _rows(k_base, tokens, columns, seen, stride_token, WIDTH)
            scores = _scores_of_cls(q_cls, k, tokens, seen, table, num_rows, scale)
            tl.store(weights_base + tokens - 1, tl.exp(scores - lse), mask=inside & (tokens > 0))


@triton.jit
def _backward_queries(
    qkv_ptr, table_ptr, codes_ptr, blocks_ptr, mask_ptr, grad_ptr, out_ptr, lse_ptr,
    grad_qkv_ptr, sums_ptr, unit_ptr, delta_ptr, cls_weight_ptr, cls_grad_ptr,
    stride_clip, stride_token, stride_part, stride_head, codes_stride,
    num_patches, num_heads, num_rows, num_slots, scale,
    SIZE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the patch queries and the table; what the other two kernels need of each query: gradient times
    output (delta), and weight and gradient of its score on the CLS key.
    """
    block, head = tl.program_id(0), tl.program_id(1) % num_heads
    clip = (tl.program_id(1) // num_heads).to(tl.int64)
    place, columns = tl.arange(0, TILE), tl.arange(0, WIDTH_TILE)
    q_base = qkv_ptr + clip * stride_clip + head * stride_head
    k_base, v_base = q_base + stride_part, q_base + 2 * stride_part
    table, codes = table_ptr + head * num_rows, codes_ptr + clip * codes_stride
    sums, per_unit = sums_ptr + head * num_rows, 1 / tl.load(unit_ptr)
    mask = mask_ptr + clip * (num_patches + 1)
    centre = (num_rows - 4) // 2

    queries = block * SIZE + place
    valid_q = (place < SIZE) & (queries < num_patches)
    q = _rows(q_base, 1 + queries, columns, valid_q, stride_token, WIDTH)
    code_q = tl.load(codes + queries, mask=valid_q, other=0)
    token_row = (clip * num_heads + head) * (num_patches + 1) + 1 + queries
    lse = tl.load(lse_ptr + token_row, mask=valid_q, other=0.0)
    mixed_base = clip * (num_patches + 1) * num_heads * WIDTH + head * WIDTH
    grad = _rows(grad_ptr + mixed_base, 1 + queries, columns, valid_q, num_heads * WIDTH, WIDTH)
    out = _rows(out_ptr + mixed_base, 1 + queries, columns, valid_q, num_heads * WIDTH, WIDTH)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + token_row, delta, mask=valid_q)

    k_cls, v_cls = _row(k_base, columns, WIDTH), _row(v_base, columns, WIDTH)
    score = tl.sum(q.to(tl.float32) * k_cls[None, :], axis=1) * scale + tl.load(table + num_rows - 2)
    cls_weight = tl.where(valid_q, tl.exp(score - lse), 0.0)
    cls_grad = cls_weight * (tl.sum(grad.to(tl.float32) * v_cls[None, :], axis=1) - delta)
    tl.store(cls_weight_ptr + token_row, cls_weight, mask=valid_q)
    tl.store(cls_grad_ptr + token_row, cls_grad, mask=valid_q)
    grad_q = cls_grad[:, None] * k_cls[None, :]
    for slot in range(num_slots):
        key_block = tl.load(blocks_ptr + block * num_slots + slot).to(tl.int32)
        if key_block >= 0:
            keys = key_block * SIZE + place
            valid_k = _seen_keys(mask, 1 + keys, (place < SIZE) & (keys < num_patches), HAS_MASK)
            k = _rows(k_base, 1 + keys, columns, valid_k, stride_token, WIDTH)
            v = _rows(v_base, 1 + keys, columns, valid_k, stride_token, WIDTH)
            code_k = tl.load(codes + keys, mask=valid_k, other=0)
            seen = valid_q[:, None] & valid_k[None, :]
            scores, rows = _scores_of(q, k, code_q, code_k, seen, table, centre, scale, PRECISION)
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_scores = tl.exp(scores - lse[:, None]) * (grad_weights - delta[:, None])
            grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
            _add_fixed(sums, rows, grad_scores, per_unit, seen)
    grad_base = grad_qkv_ptr + clip * (num_patches + 1) * 3 * num_heads * WIDTH + head * WIDTH
    at = grad_base + (1 + queries)[:, None] * (3 * num_heads * WIDTH) + columns[None, :]
    grad_q = (grad_q * scale).to(grad_qkv_ptr.dtype.element_ty)
    tl.store(at, grad_q, mask=valid_q[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _backward_keys(
    qkv_ptr, table_ptr, codes_ptr, first_ptr, users_ptr, mask_ptr, grad_ptr, out_ptr, lse_ptr, delta_ptr,
    grad_qkv_ptr,
    stride_clip, stride_token, stride_part, stride_head, codes_stride,
    num_patches, num_heads, num_rows, scale,
    SIZE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block's keys and values, over CLS and the query blocks that list it: no atomics."""
    block, head = tl.program_id(0), tl.program_id(1) % num_heads
    clip = (tl.program_id(1) // num_heads).to(tl.int64)
    place, columns = tl.arange(0, TILE), tl.arange(0, WIDTH_TILE)
    q_base = qkv_ptr + clip * stride_clip + head * stride_head
    k_base, v_base = q_base + stride_part, q_base + 2 * stride_part
    table, codes = table_ptr + head * num_rows, codes_ptr + clip * codes_stride
    mask = mask_ptr + clip * (num_patches + 1)
    lse_base = lse_ptr + (clip * num_heads + head) * (num_patches + 1)
    delta_base = delta_ptr + (clip * num_heads + head) * (num_patches + 1)
    mixed_base = clip * (num_patches + 1) * num_heads * WIDTH + head * WIDTH
    centre = (num_rows - 4) // 2

    keys = block * SIZE + place
    stored = (place < SIZE) & (keys < num_patches)
    valid_k = _seen_keys(mask, 1 + keys, stored, HAS_MASK)
    k = _rows(k_base, 1 + keys, columns, valid_k, stride_token, WIDTH)
    v = _rows(v_base, 1 + keys, columns, valid_k, stride_token, WIDTH)
    code_k = tl.load(codes + keys, mask=valid_k, other=0)

    q_cls = _row(q_base, columns, WIDTH)
    grad_cls, out_cls = (
        _row(grad_ptr + mixed_base, columns, WIDTH),
        _row(out_ptr + mixed_base, columns, WIDTH),
    )
    scores_cls = _scores_of_cls(q_cls, k, 1 + keys, valid_k, table, num_rows, scale)
    weights_cls = tl.exp(scores_cls - tl.load(lse_base))
    grads_cls = tl.sum(v.to(tl.float32) * grad_cls[None, :], axis=1) - tl.sum(grad_cls * out_cls)
    grad_k = (weights_cls * grads_cls)[:, None] * q_cls[None, :]
    grad_v = weights_cls[:, None] * grad_cls[None, :]
    for place_in_list in range(tl.load(first_ptr + block), tl.load(first_ptr + block + 1)):
        queries = tl.load(users_ptr + place_in_list).to(tl.int32) * SIZE + place
        valid_q = (place < SIZE) & (queries < num_patches)
        q = _rows(q_base, 1 + queries, columns, valid_q, stride_token, WIDTH)
        code_q = tl.load(codes + queries, mask=valid_q, other=0)
        lse = tl.load(lse_base + 1 + queries, mask=valid_q, other=0.0)
        delta = tl.load(delta_base + 1 + queries, mask=valid_q, other=0.0)
        grad = _rows(grad_ptr + mixed_base, 1 + queries, columns, valid_q, num_heads * WIDTH, WIDTH)
        seen = valid_q[:, None] & valid_k[None, :]
        scores, _ = _scores_of(q, k, code_q, code_k, seen, table, centre, scale, PRECISION)
        weights = tl.exp(scores - lse[:, None])
        grad_v += tl.dot(tl.trans(weights).to(grad.dtype), grad, input_precision=PRECISION)
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_k += tl.dot(tl.trans(grad_scores).to(q.dtype), q, input_precision=PRECISION)
    grad_base = grad_qkv_ptr + clip * (num_patches + 1) * 3 * num_heads * WIDTH + head * WIDTH
    at = grad_base + (1 + keys)[:, None] * (3 * num_heads * WIDTH) + columns[None, :]
    inside = stored[:, None] & (columns < WIDTH)[None, :]
    tl.store(at + num_heads * WIDTH, (grad_k * scale).to(grad_qkv_ptr.dtype.element_ty), mask=inside)
    tl.store(at + 2 * num_heads * WIDTH, grad_v.to(grad_qkv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_cls(
    qkv_ptr, table_ptr, mask_ptr, grad_ptr, out_ptr, lse_ptr, cls_weight_ptr, cls_grad_ptr,
    grad_qkv_ptr, sums_ptr, unit_ptr,
    stride_clip, stride_token, stride_part, stride_head, num_patches, num_heads, num_rows, scale,
    PIECE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Gradients of CLS as query and as key, and of the table's last three rows; after `_backward_queries`."""
    head, clip = tl.program_id(0) % num_heads, (tl.program_id(0) // num_heads).to(tl.int64)
    place, columns = tl.arange(0, PIECE), tl.arange(0, WIDTH_TILE)
    q_base = qkv_ptr + clip * stride_clip + head * stride_head
    k_base, v_base = q_base + stride_part, q_base + 2 * stride_part
    table, mask = table_ptr + head * num_rows, mask_ptr + clip * (num_patches + 1)
    mixed_base = clip * (num_patches + 1) * num_heads * WIDTH + head * WIDTH
    token_base = (clip * num_heads + head) * (num_patches + 1)
    sums, per_unit = sums_ptr + head * num_rows, 1 / tl.load(unit_ptr)
    q_cls, lse_cls = _row(q_base, columns, WIDTH), tl.load(lse_ptr + token_base)
    grad_cls = _row(grad_ptr + mixed_base, columns, WIDTH)
    delta_cls = tl.sum(grad_cls * _row(out_ptr + mixed_base, columns, WIDTH))

    grad_q = tl.zeros((WIDTH_TILE,), tl.float32)
    grad_k, grad_v = grad_q, grad_q
    from_cls, to_cls = tl.zeros((PIECE,), tl.float32), tl.zeros((PIECE,), tl.float32)
    for start in range(0, num_patches + 1, PIECE):
        tokens = start + place
        inside = tokens <= num_patches
        seen = _seen_keys(mask, tokens, inside, HAS_MASK)
        k = _rows(k_base, tokens, columns, seen, stride_token, WIDTH).to(tl.float32)
        v = _rows(v_base, tokens, columns, seen, stride_token, WIDTH).to(tl.float32)
        weights = tl.exp(_scores_of_cls(q_cls, k, tokens, seen, table, num_rows, scale) - lse_cls)
        grads = weights * (tl.sum(v * grad_cls[None, :], axis=1) - delta_cls)
        grad_q += tl.sum(grads[:, None] * k, axis=0)
        from_cls += grads
        # The other way round: every token as a query of the CLS key, CLS itself among them.
        weights = tl.where(
            tokens == 0,
            weights,
            tl.load(cls_weight_ptr + token_base + tokens, mask=inside & (tokens > 0), other=0.0),
        )
        grads = tl.where(
            tokens == 0,
            grads,
            tl.load(cls_grad_ptr + token_base + tokens, mask=inside & (tokens > 0), other=0.0),
        )
        q = _rows(q_base, tokens, columns, inside, stride_token, WIDTH).to(tl.float32)
        grad = _rows(grad_ptr + mixed_base, tokens, columns, inside, num_heads * WIDTH, WIDTH)
        grad_k += tl.sum(grads[:, None] * q, axis=0)
        grad_v += tl.sum(weights[:, None] * grad.to(tl.float32), axis=0)
        to_cls += grads
        if start == 0:
            # CLS on itself has a row of its own.
            own = tl.where(place == 0, grads, 0.0)
            from_cls -= own
            to_cls -= own
            _add_fixed(sums, num_rows - 1 + place, grads, per_unit, place == 0)
    at = grad_qkv_ptr + clip * (num_patches + 1) * 3 * num_heads * WIDTH + head * WIDTH + columns
    dtype = grad_qkv_ptr.dtype.element_ty
    tl.store(at, (grad_q * scale).to(dtype), mask=columns < WIDTH)
    tl.store(at + num_heads * WIDTH, (grad_k * scale).to(dtype), mask=columns < WIDTH)
    tl.store(at + 2 * num_heads * WIDTH, grad_v.to(dtype), mask=columns < WIDTH)
    _add_fixed(sums, num_rows - 3 + 0 * place, from_cls, per_unit, place >= 0)
    _add_fixed(sums, num_rows - 2 + 0 * place, to_cls, per_unit, place >= 0)


class _Call:
    """What the kernels share of one call."""

    def __init__(self, qkv: Tensor, table: Tensor, codes: Tensor, size: int, key_mask: Tensor | None) -> None:
        self.qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        self.num_clips, num_tokens, _, self.num_heads, width = qkv.shape
        self.num_patches, self.num_rows = num_tokens - 1, table.shape[0]
        self.table_AR = table.float().T.contiguous()
        # Half the width of torch's indices: a third less time for a lookup.
        self.codes = codes.to(torch.int32).contiguous()
        self.codes_stride = self.codes.stride(0) if codes.dim() == 2 else 0
        self.key_mask = key_mask.contiguous() if key_mask is not None else self.codes
        self.scale = width**-0.5
        self.block_grid = (-(-self.num_patches // size), self.num_clips * self.num_heads)
        self.cls_grid = (self.num_clips * self.num_heads,)
        shared = {
            "WIDTH": width,
            "WIDTH_TILE": max(_LEAST_TILE, triton.next_power_of_2(width)),
            "HAS_MASK": key_mask is not None,
        }
        self.cls_constants = {**shared, "PIECE": _DENSE_BLOCK}
        self.block_constants = {
            **shared,
            "SIZE": size,
            "TILE": max(_LEAST_TILE, triton.next_power_of_2(size)),
            # TF32 would cost float32 its parity with the other backends.
            "PRECISION": "ieee" if qkv.dtype == torch.float32 else "tf32",
        }

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return self.qkv.stride(0), self.qkv.stride(1), self.qkv.stride(2), self.qkv.stride(3)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.num_patches, self.num_heads, self.num_rows

    def unit(self, grad: Tensor) -> Tensor:
        """What one unit of the table's fixed point is worth, so that no sum can overflow.

        A score's gradient is its weight, at most 1, times the difference of two means of gradient times values. A
        query has at most one key at a given offset, so a row of the table gathers at most one pair for each query; the
        CLS rows gather as many.
        """
        largest = torch.linalg.vector_norm(grad, torch.inf) * torch.linalg.vector_norm(
            self.qkv[:, :, 2], torch.inf
        )
        bound = 2 * grad.shape[-1] * largest.double() * self.num_clips * (self.num_patches + 1)
        return (bound * 2.0**-_SUM_BITS).clamp_min(torch.finfo(torch.float32).tiny).float()


@torch.library.custom_op("svitt::triton_attention", mutates_args=())
def triton_attention(
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
    with_cls_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed values (B, N, A, E), log of their softmax denominators (B, A, N), CLS weights on patches (B, A, n)."""
    call = _Call(qkv, table, codes, block_size, key_mask)
    out = qkv.new_empty(call.num_clips, call.num_patches + 1, call.num_heads, qkv.shape[-1])
    lse, cls_weights = _side_outputs(qkv, with_cls_weights)
    blocks = key_blocks.contiguous()
    _forward[call.block_grid](
        call.qkv, call.table_AR, call.codes, blocks, call.key_mask, out, lse,
        *call.strides, call.codes_stride, *call.sizes, blocks.shape[1], call.scale, **call.block_constants,
    )  # fmt: skip
    _forward_cls[call.cls_grid](
        call.qkv, call.table_AR, call.key_mask, out, lse, cls_weights,
        *call.strides, *call.sizes, call.scale, WITH_WEIGHTS=with_cls_weights, **call.cls_constants,
    )  # fmt: skip
    return out, lse, cls_weights


def _side_outputs(qkv: Tensor, with_cls_weights: bool) -> tuple[Tensor, Tensor]:
    clips, tokens, _, heads, _ = qkv.shape
    num_weights = tokens - 1 if with_cls_weights else 0
    return (
        qkv.new_empty(clips, heads, tokens, dtype=torch.float32),
        qkv.new_empty(clips, heads, num_weights, dtype=torch.float32),
    )


@triton_attention.register_fake
def _(
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
    with_cls_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    clips, tokens, _, heads, width = qkv.shape
    return qkv.new_empty(clips, tokens, heads, width), *_side_outputs(qkv, with_cls_weights)


@torch.library.custom_op("svitt::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries, keys and values (B, N, 3, A, E) and of the table (R, A)."""
    call = _Call(qkv, table, codes, block_size, key_mask)
    grad, blocks = grad.contiguous(), key_blocks.contiguous()
    unit = call.unit(grad)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    sums_AR = torch.zeros_like(call.table_AR, dtype=torch.int64)
    delta, cls_weight, cls_grad = (torch.empty_like(lse) for _ in range(3))
    _backward_queries[call.block_grid](
        call.qkv, call.table_AR, call.codes, blocks, call.key_mask, grad, out, lse,
        grad_qkv, sums_AR, unit, delta, cls_weight, cls_grad,
        *call.strides, call.codes_stride, *call.sizes, blocks.shape[1], call.scale, **call.block_constants,
    )  # fmt: skip
    _backward_cls[call.cls_grid](
        call.qkv, call.table_AR, call.key_mask, grad, out, lse, cls_weight, cls_grad,
        grad_qkv, sums_AR, unit,
        *call.strides, *call.sizes, call.scale, **call.cls_constants,
    )  # fmt: skip
    first, users = _users_of(blocks)
    _backward_keys[call.block_grid](
        call.qkv, call.table_AR, call.codes, first, users, call.key_mask, grad, out, lse, delta, grad_qkv,
        *call.strides, call.codes_stride, *call.sizes, call.scale, **call.block_constants,
    )  # fmt: skip
    grad_table = (sums_AR.double() * unit).to(table.dtype).T.contiguous()
    return grad_qkv, grad_table


@triton_attention_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape)


def _users_of(key_blocks_SK: Int[Tensor, "S K"]) -> tuple[Int[Tensor, " S+1"], Int[Tensor, " S*K"]]:
    """For every key block where its query blocks start in the list, and the list."""
    num_blocks, num_slots = key_blocks_SK.shape
    listed = key_blocks_SK.flatten()
    listed = torch.where(listed < 0, num_blocks, listed)  # unused places last
    order = listed.sort(stable=True)
    first = torch.searchsorted(order.values, torch.arange(num_blocks + 1, device=listed.device))
    return first, order.indices // num_slots


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, table, codes, key_blocks, block_size, key_mask, _ = inputs
    out, lse, cls_weights = output
    ctx.mark_non_differentiable(lse, cls_weights)
    ctx.save_for_backward(qkv, table, codes, key_blocks, key_mask, out, lse)
    ctx.block_size = block_size


def _backward(ctx: Any, grad_out: Tensor, _: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:
    qkv, table, codes, key_blocks, key_mask, out, lse = ctx.saved_tensors
    grads = triton_attention_backward(
        grad_out, qkv, table, codes, key_blocks, ctx.block_size, key_mask, out, lse
    )
    return *grads, None, None, None, None, None


triton_attention.register_autograd(_backward, setup_context=_setup_context)
