"""MLflow gets every point once, whatever happens to it, to the writer or to the forwarder."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.entities import Metric

from infra.journal import Journal
from infra.mlflow_tracker import MlflowForwarder, MlflowRuns, TrackingError, sqlite_uri


class FakeRun:
    """One run of a server that can be down, or lose its answer after having stored."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, int, float]] = []
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.is_down = False
        self.lost_answers = 0
        self.opened = threading.Event()

    def open(self) -> Any:
        if self.is_down:
            raise ConnectionError("refused")
        self.opened.set()
        return self, "run"

    def get_run(self, run_id: str) -> Any:
        last: dict[str, int] = {}
        for name, step, _ in self.metrics:
            last[name] = max(step, last.get(name, -1))
        objects = [Metric(name, 0.0, 0, step) for name, step in last.items()]
        return SimpleNamespace(data=SimpleNamespace(_metric_objs=objects, params=dict(self.params)))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        if self.is_down:
            raise ConnectionError("refused")
        self.metrics += [(m.key, m.step, m.value) for m in metrics]
        self.params.update({p.key: p.value for p in params})
        self.tags.update({t.key: t.value for t in tags})
        if self.lost_answers and metrics:
            self.lost_answers -= 1
            raise TimeoutError("no answer")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with contextlib.closing(Journal(tmp_path / "a.jsonl")) as opened:
        yield opened


def forward(run: FakeRun, journal: Journal, timeout_s: float = 5.0) -> int:
    return MlflowForwarder(journal.path, run.open, poll_s=0.01).close(timeout_s)


def write(journal: Journal, steps: range) -> None:
    for step in steps:
        journal.metrics(step, {"loss": 1.0 / step})
    journal.flush()


def expected(steps: range) -> list[tuple[str, int, float]]:
    return [("loss", step, 1.0 / step) for step in steps]


def test_forwarding_twice_stores_every_point_once(journal: Journal) -> None:
    run = FakeRun()
    write(journal, range(1, 1200))
    assert forward(run, journal) == 0
    with contextlib.closing(Journal(journal.path, resume_step=1190)) as again:
        write(again, range(1191, 1300))
        assert forward(run, again) == 0
    assert run.metrics == expected(range(1, 1300))


def test_an_answer_lost_after_storing_does_not_double_points(journal: Journal) -> None:
    run = FakeRun()
    run.lost_answers = 2
    write(journal, range(1, 1300))
    assert forward(run, journal) == 0
    assert run.metrics == expected(range(1, 1300))


def test_a_server_down_at_the_start_gets_everything_later(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun()
    run.is_down = True
    forwarder = MlflowForwarder(journal.path, run.open, poll_s=0.01, longest_pause_s=0.02)
    write(journal, range(1, 4))
    with caplog.at_level(logging.INFO):
        time.sleep(0.1)
        run.is_down = False
        assert run.opened.wait(5)
        write(journal, range(4, 6))
        assert forwarder.close(5) == 0
    assert run.metrics == expected(range(1, 6))
    assert "training goes on" in caplog.text


def test_what_stays_unsent_is_counted_and_said(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    run = FakeRun()
    run.is_down = True
    write(journal, range(1, 4))
    assert forward(run, journal, timeout_s=0.1) == 3
    assert "3 journal lines have not reached MLflow" in caplog.text
    run.is_down = False
    assert forward(run, journal) == 0
    assert run.metrics == expected(range(1, 4))


def test_a_changed_param_becomes_a_tag(journal: Journal) -> None:
    run = FakeRun()
    journal.params({"lr": 1e-3, "seed": 0})
    journal.params({"lr": 2e-3, "seed": 0})
    journal.tags({"checkpoint": "step-00000010"})
    journal.flush()
    assert forward(run, journal) == 0
    assert run.params == {"lr": "0.001", "seed": "0"}
    assert run.tags == {"changed.lr": "0.002", "checkpoint": "step-00000010"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> MlflowRuns:
    folder = tmp_path_factory.mktemp("mlflow")
    return MlflowRuns(sqlite_uri(folder / "mlflow.db"), "svitt-ego", folder / "artifacts")


def test_runs_are_found_again_by_key_id_and_parent(runs: MlflowRuns) -> None:
    parent = runs.ensure("demo", "curriculum", tags={"commit": "abc"})
    child = runs.ensure("demo/0", "stage 1", parent_run_id=parent)
    runs.finish(child, "FAILED")
    assert runs.ensure("demo/0", "stage 1", parent_run_id=parent) == child
    assert runs.ensure("demo/0", "stage 1", run_id=child) == child
    assert runs.ensure("demo/0", "stage 1", run_id="0" * 32) == child
    info = runs.client.get_run(child)
    assert info.info.status == "RUNNING"
    assert info.data.tags["mlflow.parentRunId"] == parent
    assert info.info.artifact_uri is not None
    assert info.info.artifact_uri.startswith("file:///")


def test_a_real_run_holds_every_point_once(runs: MlflowRuns, journal: Journal) -> None:
    run_id = runs.ensure("real", "stage 1")
    journal.params({"stage": {"num_frames": 4}})
    write(journal, range(1, 700))
    for _ in range(2):
        forwarder = MlflowForwarder(journal.path, lambda: (runs.client, run_id), poll_s=0.01)
        assert forwarder.close(20) == 0
        write(journal, range(700, 710))
    history = runs.client.get_metric_history(run_id, "loss")
    assert sorted(m.step for m in history) == list(range(1, 710))
    assert runs.client.get_run(run_id).data.params == {"stage.num_frames": "4"}
    runs.finish(run_id, "FINISHED")
    assert runs.client.get_run(run_id).info.status == "FINISHED"


def test_an_unreachable_server_is_a_typed_error_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"opening MLflow at postgresql://\*\*\*@127.0.0.1:1/x failed"):
        MlflowRuns("postgresql://me:secret@127.0.0.1:1/x", "e", tmp_path)
