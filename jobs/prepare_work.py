"""What the passes of preparation over one set share: where it lies, how it is cut, and where the work runs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from jobs.progress import ProgressReport
from pipeline.config import PrepareConfig
from pipeline.storage import StoragePath

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Mapper(Protocol):
    """Runs `fn` on every item, here or on a cluster; yields the results in any order."""

    def __call__(self, fn: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]: ...


def serial_mapper(fn: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
    """One item after the other in this process."""
    return (fn(item) for item in items)


@dataclass(frozen=True)
class SetWork:
    """One set under way. It stays in this process: functions given to `mapper` take out of it what they need."""

    name: str
    videos_dir: str
    out_dir: StoragePath
    config: PrepareConfig
    mapper: Mapper
    progress: ProgressReport
