"""Asking a run to save and leave, by a file in its folder that the ranks look for before every step."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Literal

from infra.durable import write_durably
from jobs.run_dir import RunDir

StopReason = Literal["user", "signal"]


def ask_to_stop(run: RunDir, reason: StopReason) -> None:
    """The run saves before its next step and leaves."""
    write_durably(run.stop_file, json.dumps({"reason": reason}) + "\n")


def stop_reason(run: RunDir) -> str | None:
    """Why a stop was asked for; None where it was not."""
    try:
        return str(json.loads(run.stop_file.read_text())["reason"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return "unknown"


@contextlib.contextmanager
def leaving_on_signals(first: Callable[[str], None]) -> Iterator[None]:
    """Inside, in the main thread, the first SIGTERM or SIGINT calls `first(name)`; the second leaves at once."""
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            print(f"svitt: {signal.Signals(number).name} again, leaving at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        first(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
