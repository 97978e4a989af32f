"""Gathering over ranks with exact gradients; the only user of torch.distributed in this package."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
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


def all_gather_with_gradient(rows: Float[Tensor, "B ..."]) -> Float[Tensor, "G ..."]:
    """Rows of all ranks in rank order; the backward pass sums the gradients that all ranks hold for a row.

    When every rank computes the same loss from the gathered rows, that sum is world_size times the gradient
    of the loss, and the mean over ranks that the engine takes afterwards gives exactly the single-process
    gradient.
    """
    if not is_distributed():
        return rows
    return _AllGather.apply(rows)  # pyright: ignore[reportReturnType]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
