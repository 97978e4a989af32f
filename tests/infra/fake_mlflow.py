"""An MLflow of dictionaries that can be down, and lose a request before, in the middle of, or after storing it."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from mlflow.entities import Metric

from infra.journal import Record, valid_records

Fault = Literal["before", "halfway", "after"]
Point = tuple[str, int, int, float | str]


class FakeMlflow:
    """One server with the runs of one journal; like MLflow's tables it holds a point once however often it comes."""

    def __init__(self) -> None:
        self.runs: list[SimpleNamespace] = []
        self.is_down = False
        self.faults: dict[int, Fault] = {}  # by number of call, from 1
        self.num_calls = 0
        self.num_points_sent = 0

    @property
    def run(self) -> Any:
        """The one that is not in the trash."""
        (found,) = [run for run in self.runs if not run.is_deleted]
        return found

    def open(self, outdated: str | None = None) -> Any:
        self._fail("before")
        if outdated is not None:
            self.runs[int(outdated)].is_deleted = True
        if all(run.is_deleted for run in self.runs):
            self.runs.append(SimpleNamespace(points={}, params={}, tags={}, is_deleted=False))
        return self, str(self.runs.index(self.run))

    def get_run(self, run_id: str) -> Any:
        self._fail("before")
        run = self.runs[int(run_id)]
        latest: dict[str, Metric] = {}
        for name, step, time_ms, value in run.points:
            newest = latest.get(name)
            if newest is None or (step, time_ms) >= (newest.step, newest.timestamp):
                latest[name] = Metric(name, float(value), time_ms, step)
        data = SimpleNamespace(
            _metric_objs=list(latest.values()), params=dict(run.params), tags=dict(run.tags)
        )
        return SimpleNamespace(data=data)

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        self.num_calls += 1
        fault = self.faults.get(self.num_calls)
        self._fail("before", fault)
        run = self.runs[int(run_id)]
        if run.is_deleted:
            raise RuntimeError("the run is in the trash")
        share = 0.5 if fault == "halfway" else 1.0
        for param in params[: math.ceil(share * len(params))]:
            if run.params.setdefault(param.key, param.value) != param.value:
                raise RuntimeError("a param cannot change")
        for metric in metrics[: math.ceil(share * len(metrics))]:
            run.points[point(metric.key, metric.step, metric.timestamp, metric.value)] = None
            self.num_points_sent += 1
        run.tags.update({tag.key: tag.value for tag in tags[: math.ceil(share * len(tags))]})
        if fault is not None:
            raise TimeoutError("no answer")

    def _fail(self, when: Fault, fault: Fault | None = None) -> None:
        if self.is_down or fault == when:
            raise ConnectionError("refused")


def point(name: str, step: int, time_ms: int, value: float) -> Point:
    """Comparable also where the value is NaN."""
    return name, step, time_ms, str(value)


def points_of(records: list[Record]) -> list[Point]:
    """The points of a journal's records in their order."""
    return [
        point(name, r.step, r.time_ms, v)
        for r in records
        if r.kind == "metrics"
        for name, v in r.values.items()
    ]


def require_equal(server: FakeMlflow, journal: Path) -> None:
    """Every point of the journal once, each metric's in the journal's order."""
    expected, found = points_of(valid_records(journal)), list(server.run.points)
    assert Counter(found) == Counter(expected)
    for name in {p[0] for p in expected}:
        assert [p for p in found if p[0] == name] == [p for p in expected if p[0] == name]
