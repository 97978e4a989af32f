"""Who may drive a run: a lease on a file, held by one process at a time, until it gives it up or dies.

Processes of one host are told apart by a lock of the operating system, which no death leaves behind. Hosts that share
a file system but no locks see each other by a counter that the holder keeps raising; it is stale when it has not moved
for a while of the observer's own time, so clocks that differ decide nothing.
"""

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

from filelock import FileLock, Timeout

from infra.checkpoint import write_durably

logger = logging.getLogger(__name__)


class LeaseHeldError(Exception):
    """Somebody else holds the lease; the message says who and what to do."""


@dataclass(frozen=True, slots=True)
class Holder:
    """What stands in the file while a lease is held."""

    host: str
    pid: int
    beat: int


class Lease:
    """Held from `acquire` to `release`, or as a context manager.

    `stale_s`: how long the counter of a holder on another host must stand still, watched from here.
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
            self._require_stale(self.holder())
        except BaseException:
            self._lock.release()
            raise
        self._closed.clear()
        self._write(0)
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """The next one may have it."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        self.path.unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def holder(self) -> Holder | None:
        """What the file says; None where there is none, or none that can be read."""
        with suppress(OSError, ValueError, TypeError):
            return Holder(**json.loads(self.path.read_text()))
        return None

    def _require_stale(self, holder: Holder | None) -> None:
        """The lock is free: a holder of this host is dead, one of another host may be alive."""
        if holder is None or holder.host == self._host:
            return
        waited_s = 0.0
        logger.info("%s is held from %s; watching whether it still is", self.path, holder.host)
        while waited_s < self._stale_s:
            self._sleep(self._beat_s / 2)
            waited_s += self._beat_s / 2
            now = self.holder()
            if now is None:
                return
            if now != holder:
                raise LeaseHeldError(self._told(now))
        logger.warning("%s: its holder on %s has been silent for %.0f s", self.path, holder.host, waited_s)

    def _keep(self) -> None:
        beat = 0
        while not self._closed.wait(self._beat_s):
            beat += 1
            try:
                self._write(beat)
            except OSError as error:  # the lock still holds on this host
                logger.warning("the lease %s could not be renewed: %s", self.path, error)

    def _write(self, beat: int) -> None:
        write_durably(self.path, json.dumps(asdict(Holder(self._host, os.getpid(), beat))) + "\n")

    def _told(self, holder: Holder | None) -> str:
        who = f"process {holder.pid} on {holder.host}" if holder else "another process"
        return (
            f"{self.path.parent} is being driven by {who}; wait for it, stop it (svitt stop {self.path.parent}), or "
            "choose another --run-dir"
        )
