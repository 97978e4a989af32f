"""Ends what a killed owner left behind: `python -m infra.reaper MARK LOGS OWNER`.

It waits until its stdin closes. Ray ties most of its processes to their owner's life, but an agent lingers for
a minute and a job's own children stay. Every process started under an owned cluster carries MARK in its
environment, or, if it has overwritten that with a process title, holds a log file open in a folder matching LOGS
(a regular expression). After OWNER (a process id, itself spared) has closed the cluster or died, those that do
not end by themselves within two seconds are killed. Standard library only.
"""

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

MARK_NAME = "SVITT_CLUSTER_MARK"
_GRACE_S = 2.0
_PATIENCE_S = 20.0


def marked_processes(mark: str, logs: str, spared: int) -> list[int]:
    """Ids of living processes that inherited the mark or write to such logs; not `spared` and not this one."""
    variable, folder = f"{MARK_NAME}={mark}".encode(), re.compile(logs)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable in (process / "environ").read_bytes().split(b"\0") or any(
                folder.match(os.readlink(opened)) for opened in (process / "fd").iterdir()
            ):
                found.append(int(process.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return [pid for pid in found if pid not in (os.getpid(), spared)]


def reap(mark: str, logs: str, owner: int) -> None:
    """Give marked processes two seconds, then kill them until none is left (20 s at most).

    The owner is spared: after an orderly end it lives on, with Ray's log files still open.
    """
    started = time.monotonic()
    while pids := marked_processes(mark, logs, owner):
        elapsed_s = time.monotonic() - started
        if elapsed_s > _PATIENCE_S:
            return
        if elapsed_s > _GRACE_S:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    owner_pid = int(sys.argv[3])
    sys.stdin.buffer.read()  # returns when the owner closes the pipe or dies
    reap(sys.argv[1], sys.argv[2], owner_pid)
