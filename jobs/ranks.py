"""What the loop and evaluation need of the other ranks: means, maxima, gathered values, a barrier."""

from typing import Any, Protocol

import torch
import torch.distributed as dist


class Ranks(Protocol):
    """One rank among others. Every method but the two attributes is collective."""

    rank: int
    world_size: int

    def mean(self, values: list[float]) -> list[float]: ...

    def max(self, values: list[float]) -> list[float]: ...

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on every rank."""
        ...

    def barrier(self) -> None: ...


class SingleRank:
    """No other ranks."""

    rank, world_size = 0, 1

    def mean(self, values: list[float]) -> list[float]:
        return values

    def max(self, values: list[float]) -> list[float]:
        return values

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None


class ProcessGroupRanks:
    """The ranks of torch.distributed. `device` holds the reduced numbers: a GPU for NCCL, the CPU for gloo."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._device = device

    def mean(self, values: list[float]) -> list[float]:
        return [total / self.world_size for total in self._reduce(values, dist.ReduceOp.SUM)]

    def max(self, values: list[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        return self.max([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        dist.barrier()

    def _reduce(self, values: list[float], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=operation)
        return tensor.tolist()


def ranks_of_group(device: torch.device) -> Ranks:
    """The ranks of the process group; one alone is asked nothing, which would cost it a turn of gloo's threads."""
    return ProcessGroupRanks(device) if dist.get_world_size() > 1 else SingleRank()
