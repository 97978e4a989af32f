"""Trees of processes that take turns on the machine, so that what is compared ran through the same minutes."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psutil


@dataclass
class Turns:
    """A tree of processes that is stopped (SIGSTOP) while others run, and when it ran: spans in seconds since 1970.

    Clocks go on while it is stopped, so what it does every few seconds comes more often to a second of its own.
    """

    roots: Sequence[int]
    spans: list[tuple[float, float]] = field(default_factory=list)
    _since_s: float | None = None

    def go(self) -> None:
        """Runs, from now on."""
        if self._since_s is None:
            self._since_s = time.time()
        self._signal(signal.SIGCONT)

    def halt(self) -> None:
        """Stops every process of the tree."""
        self._signal(signal.SIGSTOP)
        if self._since_s is not None:
            self.spans.append((self._since_s, time.time()))
        self._since_s = None

    def own_s(self, since_s: float, until_s: float) -> float:
        """Seconds between two moments in which the tree ran."""
        return sum(max(0.0, min(end, until_s) - max(start, since_s)) for start, end in self.spans)

    def _signal(self, number: signal.Signals) -> None:
        reached: set[psutil.Process] = set()
        # Again until none is new: a process may have started another while its elders were being told.
        while fresh := [process for process in tree(self.roots) if process not in reached]:
            for process in fresh:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            reached.update(fresh)


@contextlib.contextmanager
def leaving_at_sigterm() -> Iterator[None]:
    """Inside, in the main thread, SIGTERM raises SystemExit: who halts others has to let them go before it ends."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tree(roots: Sequence[int]) -> list[psutil.Process]:
    """The processes of these numbers that live, and all below them."""
    found: list[psutil.Process] = []
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(root)
            found += [process, *process.children(recursive=True)]
    return found


def cpu_s_of(roots: Sequence[int]) -> float:
    """Processor seconds so far of these processes and all below them that live."""
    total = 0.0
    for process in tree(roots):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total
