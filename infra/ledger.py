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

from filelock import FileLock

from infra.durable import flush
from infra.redaction import redacted

logger = logging.getLogger(__name__)

StageStatus = Literal["pending", "running", "trained", "done", "failed", "stopped"]
# How a start ended by its own account: done or stopped; error: a rank raised; collateral: it lost another rank; halved:
# it starts again with a smaller micro-batch.
EndKind = Literal["done", "stopped", "error", "rollback", "halved", "collateral", "gave_up"]
_STATUSES = ("pending", "running", "trained", "done", "failed", "stopped")


class LedgerError(Exception):
    """A ledger that cannot be read, or an event that contradicts it."""


class FencedError(LedgerError):
    """A process of a start that has been replaced meanwhile."""


@dataclass(frozen=True, slots=True)
class Start:
    """One time that all ranks of a stage came up, and how that ended.

    `generation` counts starts over the whole run: a process of an older one may write no more. `died_at` is the step
    in which the start before this one was lost, None where it ended by itself. `ended` stays None while it is at work,
    and where it was killed. Times are wall-clock seconds, for people.
    """

    generation: int
    stage: int
    attempt: int
    time_s: float
    died_at: int | None = None
    ended: EndKind | None = None
    reason: str = ""
    is_preempted: bool = False


@dataclass(frozen=True, slots=True)
class StageState:
    """How far one stage has come. `attempts` counts its jobs, `facts` keeps the latest value of each."""

    status: StageStatus = "pending"
    attempts: int = 0
    job_ids: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    starts: tuple[Start, ...] = ()
    # Wall-clock seconds of each attempt, and when the stage reached a status last.
    attempt_times_s: tuple[float, ...] = ()
    status_times_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunState:
    """What a ledger says: facts of the whole run (MLflow ids, recipe hash) and each stage by index."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[int, StageState] = field(default_factory=dict)
    num_events: int = 0
    # Wall-clock seconds of the events that started a controller.
    controller_times_s: tuple[float, ...] = ()

    @property
    def generation(self) -> int:
        """Of the newest start; 0 before the first."""
        return max((s.generation for stage in self.stages.values() for s in stage.starts), default=0)

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

    def record_start(self, stage: int, attempt: int, died_at: int | None = None) -> int:
        """The ranks of a stage have come up. Returns their generation, which no other start has."""
        state = self._append({"event": "start", "stage": stage, "attempt": attempt, "died_at": died_at})
        return state.generation

    def record_end(self, stage: int, generation: int, kind: EndKind, reason: str = "") -> RunState:
        """A start ends, by the account of one of its ranks; the first that is no `collateral` counts."""
        return self._append(
            {"event": "end", "stage": stage, "generation": generation, "kind": kind, "reason": reason[:2000]}
        )

    def record_preemption(self, stage: int, generation: int) -> RunState:
        """The machine of a start is about to be taken away: its end is not a crash."""
        return self._append({"event": "preemption", "stage": stage, "generation": generation})

    @contextlib.contextmanager
    def fenced(self, generation: int) -> Iterator[None]:
        """Hold the ledger for a change that only the newest start may make. Raises FencedError for an older one."""
        with self._lock:
            newest = self.read().generation
            if newest != generation:
                raise FencedError(
                    f"start {generation} of this run was replaced by start {newest} while it was away (a network cut, "
                    "a stopped process); it writes nothing more and leaves"
                )
            yield

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
        event = {
            **_without_secrets(event),
            "time": round(self._clock(), 3),
        }  # for people; lines have the order
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
                flush(self.path.parent)
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


def _without_secrets(event: Mapping[str, Any]) -> dict[str, Any]:
    """Reasons quote error messages, which may quote addresses and headers."""
    return {
        name: redacted(value) if name == "reason" else _without_secrets(value) if name == "facts" else value
        for name, value in event.items()
    }


def _apply(state: RunState, event: dict[str, Any]) -> RunState:
    kind, time_s = event["event"], float(event["time"])
    state = replace(state, num_events=state.num_events + 1)
    if kind == "run":
        times = state.controller_times_s
        if "controllers" in event["facts"]:
            times = (*times, time_s)
        return replace(state, facts={**state.facts, **event["facts"]}, controller_times_s=times)
    index = int(event["stage"])
    stage = _apply_to_stage(state.stage(index), state.generation, kind, time_s, event)
    return replace(state, stages={**state.stages, index: stage})


def _apply_to_stage(
    stage: StageState, generation: int, kind: str, time_s: float, event: dict[str, Any]
) -> StageState:
    if kind == "attempt":
        if event["job_id"] not in stage.job_ids:
            stage = replace(
                stage,
                attempts=stage.attempts + 1,
                job_ids=(*stage.job_ids, event["job_id"]),
                attempt_times_s=(*stage.attempt_times_s, time_s),
            )
        stage = replace(stage, status="running")
    elif kind == "stage":
        times = {**stage.status_times_s, event["status"]: time_s}
        stage = replace(stage, status=event["status"], status_times_s=times)
    elif kind == "start":
        start = Start(generation + 1, int(event["stage"]), event["attempt"], time_s, event["died_at"])
        return replace(stage, starts=(*stage.starts, start))
    elif kind in ("end", "preemption"):
        starts = tuple(
            _told(s, kind, event) if s.generation == event["generation"] else s for s in stage.starts
        )
        return replace(stage, starts=starts)
    else:
        raise ValueError(f"unknown event {kind!r}")
    return replace(stage, facts={**stage.facts, **event["facts"]})


def _told(start: Start, kind: str, event: dict[str, Any]) -> Start:
    if kind == "preemption":
        return replace(start, is_preempted=True)
    if start.ended not in (None, "collateral"):
        return start
    return replace(start, ended=event["kind"], reason=event["reason"])
