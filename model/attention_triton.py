"""Block-sparse attention on a GPU by Triton kernels, as a torch op with gradient.

Patches go through the kernels: one program for each query block (forward, gradient of queries and table) or key
block (gradient of keys and values), scores in registers, the bias looked up by position code. The CLS query is one
row and stays in plain torch. The table's gradient is added up by atomics, so its last bits differ between runs.

Imported only where the backend is asked for, as it needs Triton, which torch brings along on GPU machines. No GPU has
run it yet; the tests run the same kernels in Triton's interpreter.
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
# Dense attention is cut into blocks of this size.
_DENSE_BLOCK = 64


def attend_by_triton(
    qkv_BN3AE: Float[Tensor, "B N 3 A E"],
    codes: Int[Tensor, "*B n"],
    bias_table: Float[Tensor, "R A"],
    layout: EdgeLayout | None,
    key_mask: Bool[Tensor, "B N"] | None,
) -> tuple[Float[Tensor, "B N A E"], Float[Tensor, "B A n"]]:
    """Mixed values, and the CLS query's weights on the patches (no gradient). Arguments as `sparse_attention`."""
    q, k, v = qkv_BN3AE.unbind(2)
    if layout is None:
        num_patches = q.shape[1] - 1
        everything = torch.arange(-(-num_patches // _DENSE_BLOCK), device=q.device)
        layout = EdgeLayout(everything.expand(len(everything), -1), _DENSE_BLOCK, num_patches)
    patches, _ = patch_attention(
        q, k, v, bias_table, codes, layout.key_blocks_SK, layout.block_size, key_mask
    )
    scores_BAN = torch.einsum("bae,bnae->ban", q[:, 0], k).float() * q.shape[-1] ** -0.5
    to_patches = bias_table[-3, :, None].float().expand(-1, q.shape[1] - 1)
    scores_BAN = scores_BAN + torch.cat([bias_table[-1, :, None].float(), to_patches], dim=1)
    if key_mask is not None:
        scores_BAN = scores_BAN.masked_fill(~key_mask[:, None], float("-inf"))
    weights_BAN = scores_BAN.softmax(dim=-1)
    cls = torch.einsum("ban,bnae->bae", weights_BAN.to(v.dtype), v)
    return torch.cat([cls[:, None], patches], dim=1), weights_BAN.detach()[:, :, 1:]


@triton.jit
def _rows_of(base, patches, columns, valid, stride_token, WIDTH: tl.constexpr):
    """Rows of patches from a tensor whose token 0 is CLS, zero where not valid: (tile, E)."""
    at = base + (1 + patches)[:, None] * stride_token + columns[None, :]
    return tl.load(at, mask=valid[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _seen_keys(mask, patches, valid, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        valid = valid & (tl.load(mask + 1 + patches, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _scores_of(q, k, code_q, code_k, seen, table, centre, scale, PRECISION: tl.constexpr):
    """Scores of a tile, -inf where not seen, and the table rows they took their bias from."""
    rows = code_q[:, None] - code_k[None, :] + centre
    bias = tl.load(table + rows, mask=seen, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    return tl.where(seen, scores, float("-inf")), rows


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, table_ptr, codes_ptr, blocks_ptr, mask_ptr, out_ptr, lse_ptr,
    stride_clip, stride_token, stride_head, codes_stride, num_patches, num_heads, num_rows, num_slots, scale,
    SIZE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, clip, head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    place, columns = tl.arange(0, TILE), tl.arange(0, WIDTH_TILE)
    start = clip * stride_clip + head * stride_head
    table, codes = table_ptr + head * num_rows, codes_ptr + clip * codes_stride
    mask = mask_ptr + clip * (num_patches + 1)
    centre = (num_rows - 4) // 2

    queries = block * SIZE + place
    valid_q = (place < SIZE) & (queries < num_patches)
    q = _rows_of(q_ptr + start, queries, columns, valid_q, stride_token, WIDTH)
    code_q = tl.load(codes + queries, mask=valid_q, other=0)

    # CLS, the key that every query sees, opens the running softmax.
    k_cls = tl.load(k_ptr + start + columns, mask=columns < WIDTH, other=0.0)
    v_cls = tl.load(v_ptr + start + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    top = tl.sum(q.to(tl.float32) * k_cls.to(tl.float32)[None, :], axis=1) * scale
    top += tl.load(table + num_rows - 2)
    total = tl.full((TILE,), 1.0, tl.float32)
    mixed = tl.zeros((TILE, WIDTH_TILE), tl.float32) + v_cls[None, :]
    for slot in range(num_slots):
        key_block = tl.load(blocks_ptr + block * num_slots + slot)
        if key_block >= 0:
            keys = key_block * SIZE + place
            valid_k = _seen_keys(mask, keys, (place < SIZE) & (keys < num_patches), HAS_MASK)
            k = _rows_of(k_ptr + start, keys, columns, valid_k, stride_token, WIDTH)
            v = _rows_of(v_ptr + start, keys, columns, valid_k, stride_token, WIDTH)
            code_k = tl.load(codes + keys, mask=valid_k, other=0)
            seen = valid_q[:, None] & valid_k[None, :]
            scores, _ = _scores_of(q, k, code_q, code_k, seen, table, centre, scale, PRECISION)
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp(scores - new_top[:, None])
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(weights, axis=1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            top = new_top
    out = out_ptr + ((clip * num_patches + queries[:, None]) * num_heads + head) * WIDTH + columns[None, :]
    mixed = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out, mixed, mask=valid_q[:, None] & (columns < WIDTH)[None, :])
    tl.store(lse_ptr + tl.program_id(1) * num_patches + queries, top + tl.log(total), mask=valid_q)


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, v_ptr, table_ptr, codes_ptr, blocks_ptr, mask_ptr, grad_ptr, lse_ptr, delta_ptr,
    grad_q_ptr, grad_table_ptr, cls_weight_ptr, cls_grad_ptr,
    stride_clip, stride_token, stride_head, codes_stride, num_patches, num_heads, num_rows, num_slots, scale,
    SIZE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and table, and of the CLS key's scores, from which its own follow."""
    block, clip, head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    place, columns = tl.arange(0, TILE), tl.arange(0, WIDTH_TILE)
    start = clip * stride_clip + head * stride_head
    table, codes = table_ptr + head * num_rows, codes_ptr + clip * codes_stride
    grad_table = grad_table_ptr + head * num_rows
    mask = mask_ptr + clip * (num_patches + 1)
    centre = (num_rows - 4) // 2

    queries = block * SIZE + place
    valid_q = (place < SIZE) & (queries < num_patches)
    q = _rows_of(q_ptr + start, queries, columns, valid_q, stride_token, WIDTH)
    code_q = tl.load(codes + queries, mask=valid_q, other=0)
    row = tl.program_id(1) * num_patches + queries
    lse = tl.load(lse_ptr + row, mask=valid_q, other=0.0)
    delta = tl.load(delta_ptr + row, mask=valid_q, other=0.0)
    inside = valid_q[:, None] & (columns < WIDTH)[None, :]
    dense = ((clip * num_patches + queries[:, None]) * num_heads + head) * WIDTH + columns[None, :]
    grad = tl.load(grad_ptr + dense, mask=inside, other=0.0)

    k_cls = tl.load(k_ptr + start + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    v_cls = tl.load(v_ptr + start + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    score = tl.sum(q.to(tl.float32) * k_cls[None, :], axis=1) * scale + tl.load(table + num_rows - 2)
    weight = tl.exp(score - lse)
    cls_grad = weight * (tl.sum(grad.to(tl.float32) * v_cls[None, :], axis=1) - delta)
    tl.store(cls_weight_ptr + row, weight, mask=valid_q)
    tl.store(cls_grad_ptr + row, cls_grad, mask=valid_q)
    grad_q = cls_grad[:, None] * k_cls[None, :]
    for slot in range(num_slots):
        key_block = tl.load(blocks_ptr + block * num_slots + slot)
        if key_block >= 0:
            keys = key_block * SIZE + place
            valid_k = _seen_keys(mask, keys, (place < SIZE) & (keys < num_patches), HAS_MASK)
            k = _rows_of(k_ptr + start, keys, columns, valid_k, stride_token, WIDTH)
            v = _rows_of(v_ptr + start, keys, columns, valid_k, stride_token, WIDTH)
            code_k = tl.load(codes + keys, mask=valid_k, other=0)
            seen = valid_q[:, None] & valid_k[None, :]
            scores, rows = _scores_of(q, k, code_q, code_k, seen, table, centre, scale, PRECISION)
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_scores = tl.exp(scores - lse[:, None]) * (grad_weights - delta[:, None])
            grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
            tl.atomic_add(grad_table + rows, grad_scores, mask=seen)
    tl.store(grad_q_ptr + dense, (grad_q * scale).to(grad_q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, table_ptr, codes_ptr, first_ptr, users_ptr, mask_ptr, grad_ptr, lse_ptr, delta_ptr,
    grad_k_ptr, grad_v_ptr,
    stride_clip, stride_token, stride_head, codes_stride, num_patches, num_heads, num_rows, scale,
    SIZE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a key block's keys and values, over the query blocks that list it: no atomics."""
    block, clip, head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    place, columns = tl.arange(0, TILE), tl.arange(0, WIDTH_TILE)
    start = clip * stride_clip + head * stride_head
    table, codes = table_ptr + head * num_rows, codes_ptr + clip * codes_stride
    mask = mask_ptr + clip * (num_patches + 1)
    centre = (num_rows - 4) // 2

    keys = block * SIZE + place
    stored = (place < SIZE) & (keys < num_patches)
    valid_k = _seen_keys(mask, keys, stored, HAS_MASK)
    k = _rows_of(k_ptr + start, keys, columns, valid_k, stride_token, WIDTH)
    v = _rows_of(v_ptr + start, keys, columns, valid_k, stride_token, WIDTH)
    code_k = tl.load(codes + keys, mask=valid_k, other=0)
    grad_k = tl.zeros((TILE, WIDTH_TILE), tl.float32)
    grad_v = tl.zeros((TILE, WIDTH_TILE), tl.float32)
    for place_in_list in range(tl.load(first_ptr + block), tl.load(first_ptr + block + 1)):
        queries = tl.load(users_ptr + place_in_list) * SIZE + place
        valid_q = (place < SIZE) & (queries < num_patches)
        q = _rows_of(q_ptr + start, queries, columns, valid_q, stride_token, WIDTH)
        code_q = tl.load(codes + queries, mask=valid_q, other=0)
        row = tl.program_id(1) * num_patches + queries
        lse = tl.load(lse_ptr + row, mask=valid_q, other=0.0)
        delta = tl.load(delta_ptr + row, mask=valid_q, other=0.0)
        dense = ((clip * num_patches + queries[:, None]) * num_heads + head) * WIDTH + columns[None, :]
        grad = tl.load(grad_ptr + dense, mask=valid_q[:, None] & (columns < WIDTH)[None, :], other=0.0)
        seen = valid_q[:, None] & valid_k[None, :]
        scores, _ = _scores_of(q, k, code_q, code_k, seen, table, centre, scale, PRECISION)
        weights = tl.exp(scores - lse[:, None])
        grad_v += tl.dot(tl.trans(weights).to(grad.dtype), grad, input_precision=PRECISION)
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_k += tl.dot(tl.trans(grad_scores).to(q.dtype), q, input_precision=PRECISION)
    dense = ((clip * num_patches + keys[:, None]) * num_heads + head) * WIDTH + columns[None, :]
    inside = stored[:, None] & (columns < WIDTH)[None, :]
    tl.store(grad_k_ptr + dense, (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_v_ptr + dense, grad_v.to(grad_v_ptr.dtype.element_ty), mask=inside)


class _Call:
    """What the three kernels share of one call."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        codes: Tensor,
        size: int,
        key_mask: Tensor | None,
    ) -> None:
        if not q.stride() == k.stride() == v.stride() or q.stride(-1) != 1:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        self.q, self.k, self.v = q, k, v
        self.num_clips, num_tokens, self.num_heads, self.width = q.shape
        self.num_patches, self.num_rows = num_tokens - 1, table.shape[0]
        self.table_AR = table.float().T.contiguous()
        self.codes = codes.contiguous()
        self.codes_stride = self.codes.stride(0) if codes.dim() == 2 else 0
        self.key_mask = key_mask.contiguous() if key_mask is not None else self.codes
        self.grid = (-(-self.num_patches // size), self.num_clips * self.num_heads)
        self.constants = {
            "SIZE": size,
            "TILE": max(_LEAST_TILE, triton.next_power_of_2(size)),
            "WIDTH": self.width,
            "WIDTH_TILE": max(_LEAST_TILE, triton.next_power_of_2(self.width)),
            "HAS_MASK": key_mask is not None,
            # TF32 would cost float32 its parity with the other backends.
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        }

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return self.q.stride(0), self.q.stride(1), self.q.stride(2), self.codes_stride

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.num_patches, self.num_heads, self.num_rows

    @property
    def scale(self) -> float:
        return self.width**-0.5


@torch.library.custom_op("svitt::patch_attention", mutates_args=())
def patch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mixed values of the patch queries (B, n, A, E), log of their softmax denominators (B, A, n)."""
    call = _Call(q, k, v, table, codes, block_size, key_mask)
    out = q.new_empty(call.num_clips, call.num_patches, call.num_heads, call.width)
    lse = q.new_empty(call.num_clips, call.num_heads, call.num_patches, dtype=torch.float32)
    blocks = key_blocks.contiguous()
    _forward[call.grid](
        call.q, call.k, call.v, call.table_AR, call.codes, blocks, call.key_mask, out, lse,
        *call.strides, *call.sizes, blocks.shape[1], call.scale, **call.constants,
    )  # fmt: skip
    return out, lse


@patch_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    clips, tokens, heads, width = q.shape
    lse = q.new_empty(clips, heads, tokens - 1, dtype=torch.float32)
    return q.new_empty(clips, tokens - 1, heads, width), lse


@torch.library.custom_op("svitt::patch_attention_backward", mutates_args=())
def patch_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (B, N, A, E) and of the table (R, A)."""
    call = _Call(q, k, v, table, codes, block_size, key_mask)
    grad, blocks = grad.contiguous(), key_blocks.contiguous()
    delta = (grad.float() * out.float()).sum(dim=-1).transpose(1, 2).contiguous()
    grad_q, grad_k, grad_v = (torch.empty_like(grad) for _ in range(3))
    grad_table = torch.zeros_like(call.table_AR)
    cls_weight, cls_grad = torch.empty_like(lse), torch.empty_like(lse)
    tensors = (call.q, call.k, call.v, call.table_AR, call.codes)
    _backward_queries[call.grid](
        *tensors, blocks, call.key_mask, grad, lse, delta, grad_q, grad_table, cls_weight, cls_grad,
        *call.strides, *call.sizes, blocks.shape[1], call.scale, **call.constants,
    )  # fmt: skip
    first, users = _users_of(blocks)
    _backward_keys[call.grid](
        *tensors, first, users, call.key_mask, grad, lse, delta, grad_k, grad_v,
        *call.strides, *call.sizes, call.scale, **call.constants,
    )  # fmt: skip
    grad_table[:, -2] = cls_grad.sum(dim=(0, 2))
    q_cls = torch.zeros_like(grad_q[:, :1])  # the CLS query is not in here
    k_cls = torch.einsum("ban,bnae->bae", cls_grad.to(q.dtype), q[:, 1:])[:, None] * call.scale
    v_cls = torch.einsum("ban,bnae->bae", cls_weight.to(grad.dtype), grad)[:, None]
    whole = [torch.cat(pair, dim=1) for pair in ((q_cls, grad_q), (k_cls, grad_k), (v_cls, grad_v))]
    return whole[0], whole[1], whole[2], grad_table.T.contiguous().to(table.dtype)


@patch_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), table.new_empty(table.shape)


def _users_of(key_blocks_SK: Int[Tensor, "S K"]) -> tuple[Int[Tensor, " S+1"], Int[Tensor, " S*K"]]:
    """For every key block where its query blocks start in the list, and the list."""
    num_blocks, num_slots = key_blocks_SK.shape
    listed = key_blocks_SK.flatten()
    listed = torch.where(listed < 0, num_blocks, listed)  # unused places last
    counts = torch.zeros(num_blocks + 1, dtype=torch.long, device=listed.device)
    counts.scatter_add_(0, listed, torch.ones_like(listed))
    first = torch.nn.functional.pad(counts[:num_blocks].cumsum(0), (1, 0))
    return first, listed.argsort(stable=True) // num_slots


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, table, codes, key_blocks, block_size, key_mask = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, table, codes, key_blocks, key_mask, out, lse)
    ctx.block_size = block_size


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, table, codes, key_blocks, key_mask, out, lse = ctx.saved_tensors
    grads = patch_attention_backward(
        grad_out, q, k, v, table, codes, key_blocks, ctx.block_size, key_mask, out, lse
    )
    return *grads, None, None, None, None


patch_attention.register_autograd(_backward, setup_context=_setup_context)
