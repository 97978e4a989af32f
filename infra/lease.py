"""Who may drive a run: a lease on a file, held by one process at a time, until it gives it up or dies.

Processes of one host are told apart by a lock of the operating system, which no death leaves behind. Hosts that share
a file system but no locks see each other by a counter that the holder keeps raising; it is stale when it has not moved
for a while of the observer's own time, so clocks that differ or jump decide nothing. A holder that was away for so
long finds another's generation in the file, and leaves it alone.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from infra.durable import write_durably

logger = logging.getLogger(__name__)


class LeaseHeldError(Exception):
    """Somebody else holds the lease; the message says who and what to do."""


class LeaseLostError(Exception):
    """The lease was taken over from another host while its holder did not move."""


@dataclass(frozen=True, slots=True)
class Holder:
    """What stands in the file while a lease is held. `generation` counts holders since one last gave it back."""

    host: str
    pid: int
    generation: int
    beat: int


class Lease:
    """Held from `acquire` to `release`, or as a context manager.

    `beat_s`: between two signs of life. `stale_s`: how long the counter of a holder on another host must stand still,
    watched from here.
    """

    def __init__(
        self,
        path: Path,
        beat_s: float = 5.0,
        stale_s: float = 30.0,
        host: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path = path
        self._beat_s, self._stale_s, self._sleep = beat_s, stale_s, sleep
        self._host = host or socket.gethostname()
        self._lock = FileLock(str(path) + ".lock")
        self._mine: Holder | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Raises LeaseHeldError while another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise LeaseHeldError(self._told(self.holder())) from None
        try:
            self._take(self.holder())
        except BaseException:
            self._lock.release()
            raise
        self._closed.clear()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """The next one may have it. One that was taken over stays with who took it."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if self._is_mine(self.holder()):
            self.path.unlink(missing_ok=True)
        self._mine = None
        self._lock.release()

    def require_held(self) -> None:
        """Raises LeaseLostError where another process has taken it over, or its file is gone."""
        now = self.holder()
        if not self._is_mine(now):
            who = f"process {now.pid} on {now.host}" if now else "another process, which has ended since,"
            raise LeaseLostError(
                f"{self.path.parent} was taken over by {who} after this one had not moved for {self._stale_s:.0f} s (a "
                "stopped process, a network cut); this one leaves it alone, and svitt status says how the run fares"
            )

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def holder(self) -> Holder | None:
        """What the file says; None where there is none, or none that can be read."""
        with suppress(FileNotFoundError, ValueError, TypeError):
            return Holder(**json.loads(self.path.read_text()))
        return None

    def _take(self, before: Holder | None) -> None:
        """The lock is free: a holder of this host is dead, one of another host may be alive."""
        if before is not None and before.host != self._host:
            before = self._silent(before)
        mine = Holder(self._host, os.getpid(), before.generation + 1 if before else 1, beat=0)
        self._mine = mine
        self._write(mine)
        if (
            before is not None and before.host != self._host
        ):  # a third host may have found it stale at the same moment; the last to write has it
            self._sleep(self._beat_s / 2)
            if not self._is_mine(now := self.holder()):
                raise LeaseHeldError(self._told(now))

    def _silent(self, holder: Holder) -> Holder | None:
        """The holder, once it has been watched not to move; None where it has left meanwhile."""
        waited_s = 0.0
        logger.info("%s is held from %s; watching whether it still is", self.path, holder.host)
        while waited_s < self._stale_s:
            self._sleep(self._beat_s / 2)
            waited_s += self._beat_s / 2
            now = self.holder()
            if now is None:
                return None
            if now != holder:
                raise LeaseHeldError(self._told(now))
        logger.warning("%s: its holder on %s has been silent for %.0f s", self.path, holder.host, waited_s)
        return holder

    def _keep(self) -> None:
        assert self._mine is not None, "started by acquire"
        beating = self._mine
        while not self._closed.wait(self._beat_s):
            beating = replace(beating, beat=beating.beat + 1)
            try:
                if not self._is_mine(now := self.holder()):
                    logger.error("the lease %s is lost: it stands for %s now", self.path, now)
                    return
                self._write(beating)
            except OSError as error:  # the lock still holds on this host
                logger.warning("the lease %s could not be renewed: %s", self.path, error)

    def _is_mine(self, holder: Holder | None) -> bool:
        return holder is not None and replace(holder, beat=0) == self._mine

    def _write(self, holder: Holder) -> None:
        write_durably(self.path, json.dumps(asdict(holder)) + "\n")

    def _told(self, holder: Holder | None) -> str:
        who = f"process {holder.pid} on {holder.host}" if holder else "another process"
        return (
            f"{self.path.parent} is being driven by {who}; wait for it, stop it (svitt stop {self.path.parent}), or "
            "choose another --run-dir"
        )
