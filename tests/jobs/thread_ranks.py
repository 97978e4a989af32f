"""Ranks for tests that are threads of one process: what needs gathering only needs no process group."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from jobs.ranks import Ranks, SingleRank

WAIT_S = 60


def on_ranks(world_size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns on each rank."""
    if world_size == 1:
        return [work(SingleRank())]
    meeting, board = Barrier(world_size), {}

    def enter(rank: int) -> Any:
        try:
            return work(ThreadRanks(rank, meeting, board))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(enter, range(world_size)))


class ThreadRanks:
    """Ranks that are threads of one process and meet at a barrier."""

    def __init__(self, rank: int, meeting: Barrier, board: dict[int, Any]) -> None:
        self.rank, self.world_size = rank, meeting.parties
        self._meeting, self._board = meeting, board

    def mean(self, values: list[float]) -> list[float]:
        raise NotImplementedError

    def max(self, values: list[float]) -> list[float]:
        raise NotImplementedError

    def any(self, flag: bool) -> bool:
        raise NotImplementedError

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._meeting.wait(WAIT_S)
        values = [self._board[rank] for rank in range(self.world_size)]
        self._meeting.wait(WAIT_S)
        return values

    def barrier(self) -> None:
        raise NotImplementedError
