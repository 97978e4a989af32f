"""Signs of life of the ranks of a stage, and what is done when they stop.

Each rank overwrites one short line of its own file at every step. It lies in the page cache, so it survives the death
of the process: the next start reads there in which step the last one was lost. Order is by generation and step; the
wall-clock time is for people.
"""

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

logger = logging.getLogger(__name__)

_LINE_BYTES = 256


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank was last. `phase`: start, step, save or score."""

    generation: int
    rank: int
    step: int
    phase: str
    time_s: float
    host: str
    pid: int


class Heartbeat:
    """One rank's file."""

    def __init__(
        self, path: Path, generation: int, rank: int, clock: Callable[[], float] = time.time
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
        self._generation, self._rank, self._clock = generation, rank, clock
        self._host, self._pid = socket.gethostname()[:64], os.getpid()
        self.count = 0

    def beat(self, step: int, phase: str) -> None:
        """20 us: one write at a fixed place."""
        self.count += 1
        beat = Beat(self._generation, self._rank, step, phase, round(self._clock(), 3), self._host, self._pid)
        os.pwrite(self._file, json.dumps(asdict(beat)).ljust(_LINE_BYTES - 1).encode() + b"\n", 0)

    def close(self) -> None:
        os.close(self._file)


def read_beats(directory: Path) -> list[Beat]:
    """The last sign of each rank, in their order; files of another version are left out."""
    beats = []
    for path in directory.glob("rank-*"):
        with suppress(OSError, ValueError, TypeError):
            beats.append(Beat(**json.loads(path.read_text())))
    return sorted(beats, key=lambda beat: beat.rank)


def last_step(directory: Path, generation: int) -> int | None:
    """The step in which the ranks of a generation were last; None where they left no sign."""
    steps = [beat.step for beat in read_beats(directory) if beat.generation == generation]
    return max(steps, default=None)


class HangWatch:
    """A thread that writes the stacks of this process to a file when its heartbeat stands still, once per halt, and
    names the ranks of this host that are behind. What ends the halt is the collectives' own timeout.
    """

    def __init__(
        self, heartbeat: Heartbeat, stacks: Path, patience_s: float, poll_s: float | None = None
    ) -> None:
        self._heartbeat, self._stacks, self._patience_s = heartbeat, stacks, patience_s
        self._poll_s = min(5.0, patience_s / 5) if poll_s is None else poll_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, since_s, is_told = self._heartbeat.count, time.monotonic(), False
        while not self._closed.wait(self._poll_s):
            now_s = time.monotonic()
            if self._heartbeat.count != seen:
                seen, since_s, is_told = self._heartbeat.count, now_s, False
            elif now_s - since_s > self._patience_s and not is_told:
                is_told = True
                self._tell(now_s - since_s)

    def _tell(self, silent_s: float) -> None:
        ranks = ", ".join(
            f"rank {beat.rank} {beat.phase} {beat.step} ({describe_process(beat)})"
            for beat in read_beats(self._heartbeat.path.parent)
        )
        logger.error("no progress for %.0f s: %s. Stacks of this rank: %s", silent_s, ranks, self._stacks)
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        with self._stacks.open("a") as file:
            file.write(f"no progress for {silent_s:.0f} s: {ranks}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def describe_process(beat: Beat) -> str:
    """What the system says of a rank's process, where it runs on this host: `stopped`, `sleeping`, `gone` ..."""
    if beat.host != socket.gethostname()[:64]:
        return f"on {beat.host}"
    try:
        return str(psutil.Process(beat.pid).status())
    except psutil.NoSuchProcess:
        return "gone"
