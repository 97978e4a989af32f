"""The durable record of a run: one JSON line per event, appended under a lock and flushed to disk.

The ledger, not a cluster's job table and not MLflow, says how far a run has come. State is what remains after
replaying the lines in order.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

StageStatus = Literal["pending", "running", "trained", "done", "failed", "stopped"]
_STATUSES = ("pending", "running", "trained", "done", "failed", "stopped")


class LedgerError(Exception):
    """A ledger that cannot be read, or an event that contradicts it."""


@dataclass(frozen=True, slots=True)
class StageState:
    """How far one stage has come. `attempts` counts its jobs, `facts` keeps the latest value of each."""

    status: StageStatus = "pending"
    attempts: int = 0
    job_ids: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunState:
    """What a ledger says: facts of the whole run (MLflow ids, recipe hash) and each stage by index."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[int, StageState] = field(default_factory=dict)
    num_events: int = 0

    def stage(self, index: int) -> StageState:
        return self.stages.get(index, StageState())


class Ledger:
    """An append-only file. Any number of processes may append and read."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._lock = FileLock(str(path) + ".lock")

    def record_run(self, **facts: Any) -> RunState:
        """Remember facts of the whole run, such as `mlflow_run_id`; a later value replaces an earlier."""
        return self._append({"event": "run", "facts": facts})

    def record_attempt(self, stage: int, job_id: str, **facts: Any) -> RunState:
        """A job was submitted for a stage: it is running, one attempt more. The same id counts once."""
        return self._append({"event": "attempt", "stage": stage, "job_id": job_id, "facts": facts})

    def record_stage(self, stage: int, status: StageStatus, **facts: Any) -> RunState:
        """A stage reached a status, with what to remember about it (checkpoint, scores, MLflow ids)."""
        if status not in _STATUSES:
            raise LedgerError(f"stage status {status!r} is none of {', '.join(_STATUSES)}")
        return self._append({"event": "stage", "stage": stage, "status": status, "facts": facts})

    def read(self) -> RunState:
        """Replay the file. A torn last line (power loss while appending) is dropped and said."""
        state = RunState()
        for number, event in self._events():
            try:
                state = _apply(state, event)
            except (KeyError, TypeError, ValueError) as error:
                raise LedgerError(
                    f"{self.path} line {number} is not an event of this version: {error}"
                ) from error
        return state

    def _append(self, event: dict[str, Any]) -> RunState:
        event = {**event, "time": round(self._clock(), 3)}  # for people; order is the order of lines
        line = json.dumps(event, sort_keys=True, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._drop_torn_line()
            is_new = not self.path.exists()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                _flush_directory(self.path.parent)
            return self.read()

    def _events(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        lines = content.split(b"\n")
        if lines[-1]:
            logger.warning("%s ends in a torn line of %d bytes; it is dropped", self.path, len(lines[-1]))
        for number, line in enumerate(lines[:-1], start=1):
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise LedgerError(
                    f"{self.path} line {number} is damaged ({error}). The run cannot be continued from it; "
                    "mend the line by hand or start a run in another directory"
                ) from error

    def _drop_torn_line(self) -> None:
        """Cut an unfinished last line, so that the next event does not grow out of it. Holds the lock."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb+") as file:
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)


@contextlib.contextmanager
def sole_controller(run_dir: Path) -> Iterator[None]:
    """Hold a run directory for one controlling process, until it dies; a second one gets LedgerError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "controller.lock"
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = path.with_suffix(".pid")
        who = f" by process {holder.read_text().strip()}" if holder.is_file() else ""
        raise LedgerError(
            f"{run_dir} is being driven{who} already; wait for it, stop it, or choose another run directory"
        ) from None
    try:
        path.with_suffix(".pid").write_text(f"{os.getpid()}\n")
        yield
    finally:
        path.with_suffix(".pid").unlink(missing_ok=True)
        lock.release()


def _apply(state: RunState, event: dict[str, Any]) -> RunState:
    kind, facts = event["event"], event["facts"]
    state = replace(state, num_events=state.num_events + 1)
    if kind == "run":
        return replace(state, facts={**state.facts, **facts})
    index = int(event["stage"])
    stage = state.stage(index)
    if kind == "attempt":
        is_known = event["job_id"] in stage.job_ids
        stage = replace(
            stage,
            status="running",
            attempts=stage.attempts + (not is_known),
            job_ids=stage.job_ids if is_known else (*stage.job_ids, event["job_id"]),
        )
    elif kind == "stage":
        stage = replace(stage, status=event["status"])
    else:
        raise ValueError(f"unknown event {kind!r}")
    stage = replace(stage, facts={**stage.facts, **facts})
    return replace(state, stages={**state.stages, index: stage})


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
