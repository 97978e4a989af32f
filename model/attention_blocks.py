"""Block-sparse attention in plain torch: where no compiled kernel is at hand.

Samples, heads and query blocks are worked through in parts whose scores stay in the processor's cache. Nothing but
inputs and result is kept for the backward pass, which gathers keys and computes the weights of a part again.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from model.sparsity import EdgeLayout

# Scores of one part: half a million values of float32 are 2 MiB, of which two or three copies are alive.
_PART_SCORES = 1 << 19


def hidden(seen: Bool[Tensor, "..."], scores: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """0 where a key is seen, -inf where not. Added, because unlike a fill that costs nothing in the backward
    pass.
    """
    return torch.zeros_like(seen, dtype=scores.dtype).masked_fill_(~seen, float("-inf"))


def attend_in_blocks(
    qkv_BN3AE: Float[Tensor, "B N 3 A E"],
    codes: Int[Tensor, "*B n"],
    bias_table: Float[Tensor, "R A"],
    layout: EdgeLayout | None,
    key_mask: Bool[Tensor, "B N"] | None,
) -> tuple[Float[Tensor, "B N A E"], Float[Tensor, "B A n"]]:
    """Mixed values, and the CLS query's weights on the patches (no gradient). Arguments as `sparse_attention`."""
    if layout is None:
        everything = torch.zeros(1, 1, dtype=torch.long, device=qkv_BN3AE.device)
        layout = _layout_of(qkv_BN3AE, everything, qkv_BN3AE.shape[1] - 1)
    return _attention_in_blocks(
        qkv_BN3AE, bias_table, codes, layout.key_blocks_SK, layout.block_size, key_mask
    )


class _Part(NamedTuple):
    """Some samples and heads (X of both) and some blocks of queries (Z): queries (X Z, G, E), and the keys and values
    that each block sees (X Z, W, E). `rows` are those of the table (C, Z, G, W).
    """

    clips: slice
    heads: slice
    blocks: slice
    rows: Tensor
    q_blocks: Tensor
    k_blocks: Tensor
    v_blocks: Tensor


class _Plan:
    """What all parts of one call share."""

    def __init__(
        self, qkv: Tensor, table: Tensor, codes: Tensor, layout: EdgeLayout, key_mask: Tensor | None
    ) -> None:
        self.codes, self.layout, self.key_mask = codes, layout, key_mask
        self.num_clips, self.num_tokens, _, self.num_heads, self.width = qkv.shape
        self.num_rows = table.shape[0]
        # Sums of many small terms: half precision is worked through in float32.
        self.dtype = torch.promote_types(qkv.dtype, torch.float32)
        self.q_BANE, self.k_BANE, self.v_BANE = (self.heads_first(x) for x in qkv.unbind(2))
        self.scale = self.width**-0.5
        table = table.to(self.dtype)
        # One more row for keys that are not seen. One head after the other, so that lookups run along memory.
        unseen = table.new_full((self.num_heads, 1), float("-inf"))
        self.table_AR = torch.cat([table.T, unseen], dim=1)
        self.tokens_SW, self.valid_SW = layout.token_index()
        self.padding = layout.num_blocks * layout.block_size - layout.num_patches

    def heads_first(self, tensor_BNAE: Tensor) -> Tensor:
        """(B, A, N, E), so that a part is one piece of memory; a view where it is that already."""
        return tensor_BNAE.transpose(1, 2).to(self.dtype).contiguous()

    def parts(self) -> Iterator[_Part]:
        """Whole samples while their scores fit a part, else one sample's heads, else one head's blocks."""
        num_left = max(1, _PART_SCORES // (self.layout.block_size * self.tokens_SW.shape[1]))
        steps: list[int] = []
        for count in (self.layout.num_blocks, self.num_heads, self.num_clips):
            steps.append(min(count, num_left))
            num_left = max(1, num_left // count)
        shares_rows = self.codes.dim() == 1 and self.key_mask is None
        rows = self.rows(slice(0, 1)) if shares_rows else None
        for clips in _slices(self.num_clips, steps[2]):
            clip_rows = self.rows(clips) if rows is None else rows
            # Heads go round fastest: the rows of these blocks are still in the cache.
            for blocks, heads in itertools.product(
                _slices(self.layout.num_blocks, steps[0]), _slices(self.num_heads, steps[1])
            ):
                yield _Part(
                    clips,
                    heads,
                    blocks,
                    clip_rows[:, blocks],
                    self.queries(self.q_BANE[clips, heads], blocks),
                    self.gathered(self.k_BANE[clips, heads], blocks),
                    self.gathered(self.v_BANE[clips, heads], blocks),
                )

    def rows(self, clips: slice) -> Tensor:
        """Table row of every patch query and gathered key: (C, S, G, W), C 1 where samples share them."""
        # 64 bits, though 32 would do: torch's lookups convert other types first, which takes longer than they do.
        codes = (self.codes[clips] if self.codes.dim() == 2 else self.codes[None]).long()
        # Padded queries and CLS borrow code 0; the first are dropped afterwards, the second is set below.
        queries = functional.pad(codes, (0, self.padding)).unflatten(-1, (self.layout.num_blocks, -1))
        keys = functional.pad(codes, (1, 0))[:, self.tokens_SW]
        rows = queries.unsqueeze(-1) - keys.unsqueeze(-2) + (self.num_rows - 4) // 2
        rows.clamp_(0, self.num_rows - 4)
        rows[..., 0] = self.num_rows - 2
        seen = (
            self.valid_SW
            if self.key_mask is None
            else self.valid_SW & self.key_mask[clips][:, self.tokens_SW]
        )
        return torch.where(seen.unsqueeze(-2), rows, self.num_rows)

    def queries(self, tokens_CHNE: Tensor, blocks: slice) -> Tensor:
        """(X Z, G, E): patches cut into blocks, the last one filled up with zeros."""
        size = self.layout.block_size
        patches = tokens_CHNE[:, :, 1 + blocks.start * size : 1 + blocks.stop * size]
        missing = (blocks.stop - blocks.start) * size - patches.shape[2]
        if missing:  # padding by nothing would still copy
            patches = functional.pad(patches, (0, 0, 0, missing))
        return patches.reshape(-1, size, tokens_CHNE.shape[-1])

    def gathered(self, tokens_CHNE: Tensor, blocks: slice) -> Tensor:
        """(X Z, W, E): the tokens that each block of queries sees."""
        tokens = tokens_CHNE.flatten(0, 1).index_select(1, self.tokens_SW[blocks].flatten())
        return tokens.view(-1, self.tokens_SW.shape[1], self.width)

    def write_queries(self, target_BANE: Tensor, part: _Part, values: Tensor) -> None:
        """Writes what belongs to the queries of a part (X Z, G, E)."""
        size = self.layout.block_size
        patches = slice(1 + part.blocks.start * size, 1 + part.blocks.stop * size)
        target_CHnE = target_BANE[part.clips, part.heads, patches]
        values_CHnE = values.view(*target_CHnE.shape[:2], -1, self.width)
        target_CHnE.copy_(values_CHnE[:, :, : target_CHnE.shape[2]])

    def add_keys(self, target_BANE: Tensor, part: _Part, gathered: Tensor) -> None:
        """Adds what belongs to the tokens that blocks see (X Z, W, E). Places without a key point at CLS and bring
        zeros.
        """
        firsts_BA = torch.arange(self.num_clips * self.num_heads, device=gathered.device) * self.num_tokens
        firsts_CH = firsts_BA.view(self.num_clips, -1)[part.clips, part.heads]
        index = (firsts_CH.reshape(-1, 1) + self.tokens_SW[part.blocks].flatten()).flatten()
        target_BANE.view(-1, self.width).index_add_(0, index, gathered.view(-1, self.width))

    def weights(self, part: _Part) -> Tensor:
        """(X Z, G, W): softmax over the keys that each query block sees."""
        tables = self.table_AR[part.heads]
        # The bias first and the products on top of it: one pass less over the scores.
        scores = part.q_blocks.new_empty(len(part.q_blocks), *part.rows.shape[-2:])
        by_head = scores.view(-1, len(tables), *part.rows.shape[1:])
        # One head at a time: along one axis the lookup is a plain loop.
        for head, table_R in enumerate(tables):
            by_head[:, head] = table_R.index_select(0, part.rows.flatten()).view(part.rows.shape)
        return scores.baddbmm_(part.q_blocks, part.k_blocks.mT, alpha=self.scale).softmax(dim=-1)

    def cls_weights(self) -> Tensor:
        """(B, A, 1, N): softmax of the CLS query over all keys."""
        scores = self.q_BANE[:, :, :1] @ self.k_BANE.mT * self.scale
        scores[..., 0] += self.table_AR[:, -2, None]
        scores[..., 1:] += self.table_AR[:, -4, None, None]
        if self.key_mask is not None:
            scores += hidden(self.key_mask[:, None, None], scores)
        return scores.softmax(dim=-1)


def _slices(count: int, most: int) -> list[slice]:
    """0 .. count in as few slices of at most `most` as can be, and those even."""
    num_slices = -(-count // most)
    borders = [count * number // num_slices for number in range(num_slices + 1)]
    return [slice(*pair) for pair in itertools.pairwise(borders)]


# Operators, so that recomputed layers can keep the results (model/recompute.py) and compilers need not look inside.
@torch.library.custom_op("svitt::attention_in_blocks", mutates_args=())
def _attention_in_blocks(
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    plan = _Plan(qkv, table, codes, _layout_of(qkv, key_blocks, block_size), key_mask)
    out_BANE = qkv.new_empty(plan.q_BANE.shape)
    cls_weights = plan.cls_weights()
    out_BANE[:, :, :1] = cls_weights @ plan.v_BANE
    for part in plan.parts():
        plan.write_queries(out_BANE, part, torch.bmm(plan.weights(part), part.v_blocks))
    return out_BANE.transpose(1, 2), cls_weights[:, :, 0, 1:]


@_attention_in_blocks.register_fake
def _(
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    num_clips, num_tokens, _, num_heads, width = qkv.shape
    out_BANE = qkv.new_empty(num_clips, num_heads, num_tokens, width)
    cls_weights = qkv.new_empty(
        num_clips, num_heads, num_tokens, dtype=torch.promote_types(qkv.dtype, torch.float32)
    )
    return out_BANE.transpose(1, 2), cls_weights[:, :, 1:]


@torch.library.custom_op("svitt::attention_in_blocks_backward", mutates_args=())
def _attention_in_blocks_backward(
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    plan = _Plan(qkv, table, codes, _layout_of(qkv, key_blocks, block_size), key_mask)
    grad_BANE = plan.heads_first(grad_out)
    delta_BAN1 = (grad_BANE * plan.heads_first(out)).sum(dim=-1, keepdim=True)
    dq_BANE, dk_BANE, dv_BANE = grads = grad_BANE.new_empty(3, *grad_BANE.shape)
    grad_table = torch.zeros_like(plan.table_AR)

    # The CLS query. What it brings to keys and values is written, what patches bring is added to it.
    weights = plan.cls_weights()
    torch.mul(weights.mT, grad_BANE[:, :, :1], out=dv_BANE)
    grad_scores = (grad_BANE[:, :, :1] @ plan.v_BANE.mT).sub_(delta_BAN1[:, :, :1]).mul_(weights)
    by_head_AN = grad_scores.sum(dim=(0, 2))
    grad_table[:, -2] = by_head_AN[:, 0]
    grad_table[:, -4] = by_head_AN[:, 1:].sum(dim=1)
    grad_scores.mul_(plan.scale)
    torch.mul(grad_scores.mT, plan.q_BANE[:, :, :1], out=dk_BANE)
    dq_BANE[:, :, :1] = grad_scores @ plan.k_BANE

    for part in plan.parts():
        weights = plan.weights(part)
        grad_blocks, delta_blocks = (
            plan.queries(x[part.clips, part.heads], part.blocks) for x in (grad_BANE, delta_BAN1)
        )
        plan.add_keys(dv_BANE, part, torch.bmm(weights.mT, grad_blocks))
        grad_scores = torch.bmm(grad_blocks, part.v_blocks.mT).sub_(delta_blocks).mul_(weights)
        del weights
        _add_to_table(grad_table[part.heads], part.rows, grad_scores)
        grad_scores.mul_(plan.scale)
        plan.add_keys(dk_BANE, part, torch.bmm(grad_scores.mT, part.q_blocks))
        plan.write_queries(dq_BANE, part, torch.bmm(grad_scores, part.k_blocks))
    grad_table = grad_table[:, :-1].T.contiguous().to(table.dtype)
    return grads.permute(1, 3, 0, 2, 4).to(qkv.dtype), grad_table


@_attention_in_blocks_backward.register_fake
def _(
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor,
    block_size: int,
    key_mask: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    num_clips, num_tokens, _, num_heads, width = qkv.shape
    grads = qkv.new_empty(3, num_clips, num_heads, num_tokens, width)
    return grads.permute(1, 3, 0, 2, 4), torch.empty_like(table)


def _layout_of(qkv: Tensor, key_blocks: Tensor, block_size: int) -> EdgeLayout:
    return EdgeLayout(key_blocks, block_size, qkv.shape[1] - 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, table, codes, key_blocks, block_size, key_mask = inputs
    out, cls_weights = output
    ctx.mark_non_differentiable(cls_weights)
    ctx.save_for_backward(qkv, table, codes, key_blocks, key_mask, out)
    ctx.block_size = block_size


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, table, codes, key_blocks, key_mask, out = ctx.saved_tensors
    grads = _attention_in_blocks_backward(
        grad_out, qkv, table, codes, key_blocks, ctx.block_size, key_mask, out
    )
    return *grads, None, None, None, None


_attention_in_blocks.register_autograd(_backward, setup_context=_setup_context)


def _add_to_table(grad_AR: Tensor, rows: Tensor, grad_scores: Tensor) -> None:
    """Adds the gradient of every score to its row, a head at a time: along one axis that is a plain loop."""
    by_head = grad_scores.view(-1, len(grad_AR), *rows.shape[1:])
    if len(rows) == 1:
        by_head = by_head.sum(dim=0, keepdim=True)
    for head, grad_R in enumerate(grad_AR):
        grad_R.scatter_add_(0, rows.flatten(), by_head[:, head].flatten())
