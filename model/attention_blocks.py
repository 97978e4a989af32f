"""Block-sparse attention in plain torch: where no compiled kernel is at hand.

Heads and samples are worked through in parts whose scores stay in the processor's cache. Nothing but inputs and
result is kept for the backward pass, which gathers keys and computes the weights of a part again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from model.sparsity import EdgeLayout

# Scores of one part: a million values of float32 are 4 MiB, of which two or three copies are alive.
_PART_SCORES = 1 << 20


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
        num_patches = qkv_BN3AE.shape[1] - 1
        everything = torch.zeros(1, 1, dtype=torch.long, device=qkv_BN3AE.device)
        layout = EdgeLayout(everything, num_patches, num_patches)
    return _BlockAttention.apply(qkv_BN3AE, bias_table, codes, layout, key_mask)  # pyright: ignore


class _Part(NamedTuple):
    """Queries, keys and values of some samples and heads (X of both), keys and values per query block.

    `q` is scaled and padded to whole blocks; `rows` are those of the table, the last for keys that do not count.
    """

    q_XNE: Tensor
    k_XNE: Tensor
    v_XNE: Tensor
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
        self.q_BANE = self.q_BANE * self.scale
        table = table.to(self.dtype)
        # One more row for keys that are not seen. One head after the other, so that lookups run along memory.
        unseen = table.new_full((self.num_heads, 1), float("-inf"))
        self.table_AR = torch.cat([table.T, unseen], dim=1)
        self.tokens_SW, self.valid_SW = layout.token_index()
        self.padding = layout.num_blocks * layout.block_size - layout.num_patches

    def parts(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Slices of samples and of heads, and the table rows of these samples. Samples share their lookup."""
        one = self.tokens_SW.numel() * self.layout.block_size
        clips = max(1, min(self.num_clips, _PART_SCORES // one))
        heads = max(1, min(self.num_heads, _PART_SCORES // (one * clips)))
        for clip in range(0, self.num_clips, clips):
            rows = self.rows(slice(clip, clip + clips))
            for head in range(0, self.num_heads, heads):
                yield slice(clip, clip + clips), slice(head, head + heads), rows

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

    def heads_first(self, tensor_BNAE: Tensor) -> Tensor:
        """(B, A, N, E), so that a part is one piece of memory; a view where it is that already."""
        return tensor_BNAE.transpose(1, 2).to(self.dtype).contiguous()

    def part(self, clips: slice, heads: slice) -> _Part:
        q, k, v = (x[clips, heads].flatten(0, 1) for x in (self.q_BANE, self.k_BANE, self.v_BANE))
        index = self.tokens_SW.flatten()
        shape = (-1, self.tokens_SW.shape[1], self.width)
        k_blocks, v_blocks = (x.index_select(1, index).view(shape) for x in (k, v))
        return _Part(q, k, v, self.blocks(q), k_blocks, v_blocks)

    def blocks(self, rows_XNE: Tensor) -> Tensor:
        """(X S, G, E): patch rows cut into blocks."""
        padded = functional.pad(rows_XNE[:, 1:], (0, 0, 0, self.padding))
        return padded.reshape(-1, self.layout.block_size, self.width)

    def write_queries(self, target_BANE: Tensor, cls_X1E: Tensor, blocks: Tensor) -> None:
        """Writes a CLS row and patch rows cut into blocks (X S, G, E)."""
        patches = blocks.view(len(cls_X1E), -1, self.width)[:, : self.num_tokens - 1]
        target_BANE[:, :, 0] = cls_X1E.view(*target_BANE.shape[:2], self.width)
        target_BANE[:, :, 1:] = patches.unflatten(0, target_BANE.shape[:2])

    def weights(self, part: _Part, rows: Tensor, heads: slice) -> Tensor:
        """(X S, G, W): softmax over the keys that each query block sees."""
        scores = torch.bmm(part.q_blocks, part.k_blocks.transpose(1, 2))
        by_head = scores.view(-1, self.table_AR[heads].shape[0], *rows.shape[1:])
        # One head at a time: along one axis the lookup is a plain loop.
        for head, table_R in enumerate(self.table_AR[heads]):
            by_head[:, head] += table_R.index_select(0, rows.flatten()).view(rows.shape)
        return scores.softmax(dim=-1)

    def cls_weights(self, part: _Part, clips: slice, heads: slice) -> Tensor:
        """(X, 1, N): softmax of the CLS query over all keys."""
        scores = torch.bmm(part.q_XNE[:, :1], part.k_XNE.transpose(1, 2))
        by_head = scores.view(-1, self.table_AR[heads].shape[0], self.num_tokens)
        by_head[..., 0] += self.table_AR[heads, -2]
        by_head[..., 1:] += self.table_AR[heads, -4, None]
        if self.key_mask is not None:
            by_head += hidden(self.key_mask[clips, None], scores)
        return scores.softmax(dim=-1)

    def write_keys(self, target_BANE: Tensor, grads: Tensor, cls_grads_XNE: Tensor) -> None:
        """Writes gradients of gathered keys (X S, W, E) added up per token, on top of the CLS query's."""
        total = cls_grads_XNE.reshape(-1, self.width)
        first_X1 = torch.arange(len(cls_grads_XNE), device=total.device)[:, None] * self.num_tokens
        # Places that hold no key point at CLS and bring zeros.
        total.index_add_(0, (self.tokens_SW.flatten() + first_X1).flatten(), grads.view(-1, self.width))
        target_BANE.copy_(total.view(target_BANE.shape))


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, qkv: Tensor, table: Tensor, codes: Tensor, layout: EdgeLayout, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        plan = _Plan(qkv, table, codes, layout, key_mask)
        out_BANE = qkv.new_empty(plan.num_clips, plan.num_heads, plan.num_tokens, plan.width)
        cls_out = plan.table_AR.new_empty(plan.num_clips, plan.num_heads, plan.num_tokens - 1)
        for clips, heads, rows in plan.parts():
            part = plan.part(clips, heads)
            mixed = torch.bmm(plan.weights(part, rows, heads), part.v_blocks)
            cls_weights = plan.cls_weights(part, clips, heads)
            cls_out[clips, heads] = cls_weights[:, 0, 1:].view(-1, *cls_out[:1, heads].shape[1:])
            plan.write_queries(out_BANE[clips, heads], torch.bmm(cls_weights, part.v_XNE), mixed)
        out = out_BANE.transpose(1, 2)
        ctx.save_for_backward(qkv, table, codes, key_mask, out)
        ctx.layout = layout
        ctx.mark_non_differentiable(cls_out)
        return out, cls_out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        qkv, table, codes, key_mask, out = ctx.saved_tensors
        plan = _Plan(qkv, table, codes, ctx.layout, key_mask)
        grad_BANE = plan.heads_first(grad_out)
        delta_BAN1 = (grad_BANE * plan.heads_first(out)).sum(dim=-1, keepdim=True)
        dq_BANE, dk_BANE, dv_BANE = grads = qkv.new_empty(3, *grad_BANE.shape)
        grad_table = torch.zeros_like(plan.table_AR)
        for clips, heads, rows in plan.parts():
            part = plan.part(clips, heads)
            grad_XNE, delta_XN1 = (x[clips, heads].flatten(0, 1) for x in (grad_BANE, delta_BAN1))

            weights = plan.cls_weights(part, clips, heads)
            grad_cls = torch.bmm(grad_XNE[:, :1], part.v_XNE.transpose(1, 2))
            grad_cls = (grad_cls - delta_XN1[:, :1]) * weights
            dq_cls = torch.bmm(grad_cls, part.k_XNE)
            dk_cls = grad_cls.transpose(1, 2) * part.q_XNE[:, :1]
            dv_cls = weights.transpose(1, 2) * grad_XNE[:, :1]
            by_head = grad_cls.view(-1, *grad_table[heads, :1].shape[:1], plan.num_tokens).sum(dim=0)
            grad_table[heads, -2] += by_head[:, 0]
            grad_table[heads, -4] += by_head[:, 1:].sum(dim=1)

            weights = plan.weights(part, rows, heads)
            grad_blocks = plan.blocks(grad_XNE)
            plan.write_keys(dv_BANE[clips, heads], torch.bmm(weights.transpose(1, 2), grad_blocks), dv_cls)
            grad_scores = torch.bmm(grad_blocks, part.v_blocks.transpose(1, 2))
            delta_blocks = functional.pad(delta_XN1[:, 1:], (0, 0, 0, plan.padding))
            grad_scores.sub_(delta_blocks.view(-1, plan.layout.block_size, 1)).mul_(weights)
            del weights
            _add_to_table(grad_table[heads], rows, grad_scores)
            plan.write_keys(
                dk_BANE[clips, heads], torch.bmm(grad_scores.transpose(1, 2), part.q_blocks), dk_cls
            )
            dq = torch.bmm(grad_scores, part.k_blocks)
            plan.write_queries(dq_BANE[clips, heads], dq_cls * plan.scale, dq.mul_(plan.scale))
        return (
            grads.permute(1, 3, 0, 2, 4),
            grad_table[:, :-1].T.contiguous().to(table.dtype),
            None,
            None,
            None,
        )


def _add_to_table(grad_AR: Tensor, rows: Tensor, grad_scores: Tensor) -> None:
    """Adds the gradient of every score to its row, a head at a time: along one axis that is a plain loop."""
    by_head = grad_scores.view(-1, len(grad_AR), *rows.shape[1:])
    if len(rows) == 1:
        by_head = by_head.sum(dim=0, keepdim=True)
    for head, grad_R in enumerate(grad_AR):
        grad_R.index_add_(0, rows.flatten(), by_head[:, head].flatten())
