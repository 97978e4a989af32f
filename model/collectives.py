"""Rows and sums over ranks, without gradient; the only user of torch.distributed in this package."""

from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def is_distributed() -> bool:
    """True when a process group of more than one rank exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def local_rows(num_rows: int) -> slice:
    """Where this rank's `num_rows` rows stand among the gathered ones."""
    rank = dist.get_rank() if is_distributed() else 0
    return slice(rank * num_rows, (rank + 1) * num_rows)


def all_gather_rows(rows: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "G ..."]:
    """Rows of all ranks in rank order, without gradient. Every rank must give the same shape."""
    if not is_distributed():
        return rows
    rows = rows.detach().contiguous()
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
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
    dist.all_reduce(values, op=dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
    return values
