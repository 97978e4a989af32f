"""What a stage measured, on disk first: an append-only file of metrics, params and tags, one JSON line each.

Tracking servers are fed from it (see mlflow_forwarder), so losing one loses nothing. A `resume` line voids the
metrics of later steps before it: after a crash those steps are computed and written again. A `saved` line says that a
checkpoint has them, so that they will not be. Lines carry the generation of their writer, and those of one that has
been replaced meanwhile do not count. Secrets are redacted before a line is written.
"""

import contextlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from infra.redaction import redacted_mapping

_NAME = re.compile(r"[A-Za-z0-9_\-./: ]{1,250}")

Scalar = str | int | float | bool | None


class Tracker(Protocol):
    """Where the training loop reports; never blocks on a network and never fails the step."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def params(self, values: Mapping[str, Any]) -> None: ...

    def tags(self, values: Mapping[str, Scalar]) -> None: ...

    def saved(self, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class NullTracker:
    """Reports to nobody: for tests and for ranks other than 0."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        return None

    def params(self, values: Mapping[str, Any]) -> None:
        return None

    def tags(self, values: Mapping[str, Scalar]) -> None:
        return None

    def saved(self, step: int) -> None:
        return None

    def flush(self) -> None:
        return None

    def close(self) -> None:
        return None


class Journal:
    """Tracker that appends to a file. One writer at a time, of any threads; readers may follow it while it grows."""

    def __init__(
        self,
        path: Path,
        resume_step: int | None = None,
        clock: Callable[[], float] = time.time,
        generation: int = 0,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self.path = path
        self._clock = clock
        self._generation = generation
        self._lock = threading.Lock()
        self._file = path.open("a", encoding="utf-8")
        if resume_step is not None:
            self._write({"kind": "resume", "step": resume_step})
            self.flush()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of one step. Names are like `train/loss`; NaN and infinities are kept."""
        for name in values:
            if not _NAME.fullmatch(name):  # a tracking server would refuse it, again and again
                raise ValueError(f"metric name {name!r} may hold letters, digits and _-./: only")
        self._write({"kind": "metrics", "step": step, "values": {k: _number(v) for k, v in values.items()}})

    def params(self, values: Mapping[str, Any]) -> None:
        """Add settings. A nested mapping becomes flat, with dotted names."""
        self._write({"kind": "params", "values": redacted_mapping(flatten(values))})

    def tags(self, values: Mapping[str, Scalar]) -> None:
        """Add or replace readable facts: provenance, checkpoint paths, fingerprints."""
        texts = {key: str(value) for key, value in values.items()}
        self._write({"kind": "tags", "values": redacted_mapping(texts)})

    def saved(self, step: int) -> None:
        """Say that a checkpoint holds everything up to this step; on disk when it returns.

        After `close` nothing is said: a stage that fails does not wait for the checkpoint it is publishing, and the
        next resume tells the same.
        """
        with contextlib.suppress(ValueError):
            self._write({"kind": "saved", "step": step})
            self.flush()

    def flush(self) -> None:
        """Put everything written so far on disk; call it once per logging interval."""
        with self._lock:
            self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.flush()
            self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        line = {**record, "time_ms": round(self._clock() * 1000), "generation": self._generation}
        with self._lock:  # checkpoints are published, and said to be, in a thread of their own
            self._file.write(json.dumps(line, sort_keys=True) + "\n")


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a journal. `step` is -1 for params and tags."""

    kind: Literal["metrics", "params", "tags", "resume", "saved"]
    step: int
    time_ms: int
    values: Mapping[str, Any]
    generation: int = 0


def read_journal(path: Path, offset: int = 0) -> tuple[list[Record], int]:
    """Whole lines from byte `offset` on, and the offset after them; an unfinished last line stays."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return [], offset
    whole = content[: content.rfind(b"\n") + 1]
    return [_parse(line) for line in whole.splitlines() if line.strip()], offset + len(whole)


def valid_records(path: Path) -> list[Record]:
    """All records that count: metrics of steps that a later `resume` line computed again are left out, and those that
    a writer of an older generation added after it.
    """
    kept, newest = [], 0
    for record in read_journal(path)[0]:
        if record.generation < newest:
            continue
        newest = record.generation
        if record.kind == "resume":
            kept = [r for r in kept if r.kind != "metrics" or r.step <= record.step]
        elif record.kind != "saved":
            kept.append(record)
    return kept


class SettledRecords:
    """Follows a growing journal and hands out what of it is settled: records that no later line is going to void.

    Params, tags, and metrics up to the newest checkpoint, which a stage goes on from after a crash: all of
    `valid_records` once it is saved after its last step. A journal that was never resumed is settled line by line. The
    sequence is a function of the file alone, so a reader that starts again meets the same records in the same places.

    Only when the newest checkpoint is damaged does a stage go on from an earlier one and void what was settled. Then
    `is_revised` becomes true where such records have been handed out: the caller has to begin anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._generation = 0
        self._settled_step: float = math.inf
        self._handed_out_step = -1
        self.waiting: list[Record] = []  # metrics past the newest checkpoint
        self.metric_names: set[str] = set()  # of all lines, those that do not count among them
        self.is_revised = False

    def read(self) -> list[Record]:
        """The records that have been settled since the last call."""
        lines, self._offset = read_journal(self._path, self._offset)
        settled: list[Record] = []
        for record in lines:
            self.metric_names.update(record.values if record.kind == "metrics" else ())
            if record.generation < self._generation:
                continue
            self._generation = record.generation
            if record.kind == "resume":
                self.waiting = [r for r in self.waiting if r.step <= record.step]
                settled = [r for r in settled if r.step <= record.step]
                self.is_revised |= self._handed_out_step > record.step
                settled += self._settle(record.step)
            elif record.kind == "saved":
                settled += self._settle(record.step)
            elif record.step > self._settled_step:
                self.waiting.append(record)
            else:
                settled.append(record)
        self._handed_out_step = max([self._handed_out_step, *(record.step for record in settled)])
        return settled

    def _settle(self, step: int) -> list[Record]:
        self._settled_step = step
        settled = [r for r in self.waiting if r.step <= step]
        self.waiting = [r for r in self.waiting if r.step > step]
        return settled


def first_time_ms(path: Path) -> int | None:
    """When a journal was begun, in milliseconds since 1970; None while it is empty."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        line = file.readline()
        if line.endswith(b"\n"):
            return _parse(line).time_ms
    return None


def metric_history(path: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric in the order of steps, as the loss curve of a run."""
    points = [
        (r.step, r.values[name]) for r in valid_records(path) if r.kind == "metrics" and name in r.values
    ]
    return sorted(points)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": [1, {"c": 2}]}} -> {"a.b.0": "1", "a.b.1.c": "2"}; a list of plain values stays a text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, list | tuple) and any(
            isinstance(item, Mapping | list | tuple) for item in value
        ):
            flat.update(flatten({str(i): item for i, item in enumerate(value)}, f"{name}."))
        else:
            flat[name] = str(value)
    return flat


def _parse(line: bytes) -> Record:
    raw = json.loads(line)
    values = raw.get("values", {})
    if raw["kind"] == "metrics":
        values = {name: float(value) for name, value in values.items()}
    return Record(raw["kind"], raw.get("step", -1), raw["time_ms"], values, raw.get("generation", 0))


def _number(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)  # JSON has no NaN; float("nan") reads it back


def _cut_torn_line(path: Path) -> None:
    """A writer killed in the middle of a line leaves a tail that would spoil the next line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
