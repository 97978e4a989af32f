"""Rows and sums over ranks, without gradient; the only user of torch.distributed in this package."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

_pretended_ranks: int | None = None


@contextmanager
def pretended_ranks(world_size: int) -> Iterator[None]:
    """Inside, this process computes as rank 0 of `world_size` and hears nothing from the others: gathered rows are its
    own, repeated, and sums are its own. For finding out what memory a step takes, without a step.
    """
    global _pretended_ranks
    before, _pretended_ranks = _pretended_ranks, world_size
    try:
        yield
    finally:
        _pretended_ranks = before


def is_distributed() -> bool:
    """True when a process group of more than one rank exists."""
    return _world_size() > 1


def _world_size() -> int:
    if _pretended_ranks is not None:
        return _pretended_ranks
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rows(num_rows: int) -> slice:
    """Where this rank's `num_rows` rows stand among the gathered ones."""
    rank = dist.get_rank() if is_distributed() and _pretended_ranks is None else 0
    return slice(rank * num_rows, (rank + 1) * num_rows)


def all_gather_rows(rows: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "G ..."]:
    """Rows of all ranks in rank order, without gradient. Every rank must give the same shape."""
    if not is_distributed():
        return rows
    rows = rows.detach().contiguous()
    parts = [torch.empty_like(rows) for _ in range(_world_size())]
    if _pretended_ranks is None:
        dist.all_gather(parts, rows)
    return torch.cat(parts)


def sum_over_ranks(values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Elementwise sum of the tensors of all ranks, on every rank."""
    return _all_reduced(values, "sum")


def max_over_ranks(values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Elementwise maximum of the tensors of all ranks, on every rank."""
    return _all_reduced(values, "max")


def _all_reduced(values: Tensor, operation: Literal["sum", "max"]) -> Tensor:
    if not is_distributed():
        return values
    values = values.detach().clone(memory_format=torch.contiguous_format)
    if _pretended_ranks is None:
        dist.all_reduce(values, op=dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
    return values
