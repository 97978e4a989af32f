"""MLflow gets every settled point once and in order, whatever happens to it, to the writer or to the forwarder."""

import contextlib
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.journal import Journal, valid_records
from infra.mlflow_forwarder import FORWARDED, JournalCopy, MlflowForwarder
from infra.mlflow_tracker import MlflowRuns, sqlite_uri
from tests.infra.fake_mlflow import FakeMlflow, Fault, points_of, require_equal


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with contextlib.closing(Journal(tmp_path / "a.jsonl", clock=ticking())) as opened:
        yield opened


class ticking:  # noqa: N801  (used like a function)
    """A clock that goes on by a second whenever it is read."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def __call__(self) -> float:
        self._now_s += 1.0
        return self._now_s


def write(journal: Journal, steps: range, loss: float = 1.0) -> None:
    for step in steps:
        journal.metrics(step, {"loss": loss / step, "lr": 0.1})
    journal.flush()


def copy(server: FakeMlflow, journal: Journal, num_tries: int = 1) -> None:
    """A new forwarder's work; every failed try but the last is repeated."""
    forwarder = JournalCopy(journal.path, server.open)
    for _ in range(num_tries - 1):
        with contextlib.suppress(ConnectionError, TimeoutError):
            return forwarder.send()
    return forwarder.send()


@pytest.mark.parametrize("fault", ["before", "halfway", "after"])
@pytest.mark.parametrize("is_new_forwarder", [False, True])
def test_a_fault_at_any_call_doubles_and_loses_nothing(
    journal: Journal, fault: Fault, is_new_forwarder: bool
) -> None:
    journal.params({f"p{i}": i for i in range(150)})
    write(journal, range(1, 600))
    journal.metrics(600, {"loss": math.nan, "lr": math.inf})
    journal.tags({"commit": "abc"})
    journal.flush()
    calm = FakeMlflow()
    copy(calm, journal)
    for number in range(1, calm.num_calls + 1):
        server = FakeMlflow()
        server.faults[number] = fault
        if is_new_forwarder:
            with pytest.raises((ConnectionError, TimeoutError)):
                copy(server, journal)
            copy(server, journal)
        else:
            copy(server, journal, num_tries=2)
        require_equal(server, journal.path)
        assert (server.run.params, server.run.tags) == (calm.run.params, calm.run.tags)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_journals_with_resumes_arrive_exactly_once_and_in_order(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Crashes at random steps, damaged checkpoints, saves said late, faults and new forwarders at random moments."""
    draw, clock = random.Random(seed), ticking()
    path, server = tmp_path_factory.mktemp("j") / "a.jsonl", FakeMlflow()
    forwarder = JournalCopy(path, server.open)
    checkpoints, step = [0], 0
    for generation in range(draw.randint(1, 5)):
        resumed = checkpoints[-1] if draw.random() < 0.7 else draw.choice(checkpoints)
        checkpoints = [c for c in checkpoints if c <= resumed]
        journal, step = Journal(path, resumed, clock, generation), resumed
        journal.params({"seed": seed, "lr": generation})
        for _ in range(draw.randint(0, 12)):
            step += 1
            values = {f"m{i}": draw.choice([0.5, math.nan, math.inf, 1.0]) for i in range(draw.randint(1, 3))}
            journal.metrics(step, values)
            if draw.random() < 0.3:
                journal.metrics(step, {"m0": 7.0})
            if draw.random() < 0.3:
                checkpoints.append(step)
                journal.saved(step)
            journal.flush()
            if draw.random() < 0.4:
                if draw.random() < 0.5:
                    fault: Fault = draw.choice(["before", "halfway", "after"])
                    server.faults[server.num_calls + draw.randint(1, 4)] = fault
                if draw.random() < 0.3:
                    forwarder = JournalCopy(path, server.open)
                with contextlib.suppress(ConnectionError, TimeoutError):
                    forwarder.send()
        journal.close()
    with contextlib.closing(Journal(path, checkpoints[-1], clock, 9)) as journal:
        journal.metrics(checkpoints[-1] + 1, {"m0": 1.0})
        journal.saved(checkpoints[-1] + 1)
    server.faults.clear()
    forwarder.send()
    require_equal(server, path)
    JournalCopy(path, server.open).send()
    require_equal(server, path)


def test_points_past_the_last_checkpoint_wait_for_it(journal: Journal) -> None:
    server = FakeMlflow()
    with contextlib.closing(Journal(journal.path, resume_step=0)) as stage:
        forwarder = JournalCopy(journal.path, server.open)
        write(stage, range(1, 5))
        forwarder.send()
        assert server.run.points == {}
        stage.saved(3)
        forwarder.send()
        assert [step for name, step, *_ in server.run.points if name == "loss"] == [1, 2, 3]
        assert forwarder.left() == (0, 1)
        stage.saved(4)
        forwarder.send()
        require_equal(server, journal.path)


def first_life(path: Path, last: int, saved: int) -> None:
    """A stage that came to step `last` and has a checkpoint of step `saved`."""
    journal = Journal(path, 0, ticking(), generation=1)
    write(journal, range(1, last + 1))
    journal.saved(saved)
    journal.close()


def life_from_step_2(path: Path, last: int) -> None:
    """The stage again, from its checkpoint of step 2, with other losses."""
    journal = Journal(path, 2, ticking(100.0), generation=2)
    write(journal, range(3, last + 1), loss=10.0)
    journal.saved(last)
    journal.close()


def test_steps_computed_again_after_a_crash_show_their_second_values(journal: Journal) -> None:
    server = FakeMlflow()
    first_life(journal.path, last=3, saved=2)
    forwarder = JournalCopy(journal.path, server.open)
    forwarder.send()
    life_from_step_2(journal.path, last=4)
    forwarder.send()
    losses = [(step, value) for name, step, _, value in server.run.points if name == "loss"]
    assert losses == [(1, "1.0"), (2, "0.5"), (3, str(10 / 3)), (4, "2.5")]
    assert len(server.runs) == 1


@pytest.mark.parametrize("is_new_forwarder", [False, True])
def test_a_damaged_checkpoint_makes_the_run_anew_from_the_journal(
    journal: Journal, is_new_forwarder: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server = FakeMlflow()
    first_life(journal.path, last=4, saved=4)
    forwarder = JournalCopy(journal.path, server.open)
    forwarder.send()
    life_from_step_2(journal.path, last=5)
    if is_new_forwarder:
        forwarder = JournalCopy(journal.path, server.open)
    forwarder.send()
    require_equal(server, journal.path)
    assert [run.is_deleted for run in server.runs] == [True, False]
    assert "made anew from the journal" in caplog.text


def test_a_forwarder_left_behind_sends_nothing_into_a_run_that_was_replaced(journal: Journal) -> None:
    server = FakeMlflow()
    first = Journal(journal.path, 0, ticking(), generation=1)
    write(first, range(1, 5))
    first.saved(4)
    left_behind = JournalCopy(journal.path, server.open)
    left_behind.send()
    second = Journal(journal.path, 2, ticking(100.0), generation=2)
    write(second, range(3, 6), loss=10.0)
    second.saved(5)
    copy(server, second)
    write(first, range(5, 7))
    first.saved(6)
    left_behind.send()
    for writer in (first, second):
        writer.close()
    require_equal(server, journal.path)


def test_two_forwarders_at_once_store_every_point_once(journal: Journal) -> None:
    server = FakeMlflow()
    one, other = JournalCopy(journal.path, server.open), JournalCopy(journal.path, server.open)
    for first, turn in ((1, (one, other)), (10, (other, one)), (20, (one,)), (30, (other, one))):
        write(journal, range(first, first + 10))
        for forwarder in turn:
            forwarder.send()
    require_equal(server, journal.path)


def test_a_step_reported_twice_shows_both_values(journal: Journal) -> None:
    server = FakeMlflow()
    for value in (1.0, 2.0):
        journal.metrics(1, {"faults/crashes": value})
        journal.flush()
        copy(server, journal)
    assert [value for *_, value in server.run.points] == ["1.0", "2.0"]


def test_a_new_forwarder_sends_only_what_the_run_does_not_count(journal: Journal) -> None:
    server = FakeMlflow()
    write(journal, range(1, 1200))
    copy(server, journal)
    assert server.run.tags == {FORWARDED: "1199"}
    write(journal, range(1200, 1203))
    sent_before = server.num_points_sent
    copy(server, journal)
    assert server.num_points_sent - sent_before == 6


def test_a_server_down_at_the_start_gets_everything_later(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    server = FakeMlflow()
    server.is_down = True
    forwarder = MlflowForwarder(journal.path, server.open, poll_s=0.01, longest_pause_s=0.02)
    write(journal, range(1, 4))
    with caplog.at_level(logging.INFO):
        deadline_s = time.monotonic() + 5
        while "training goes on" not in caplog.text and time.monotonic() < deadline_s:
            time.sleep(0.01)
        server.is_down = False
        write(journal, range(4, 6))
        assert forwarder.close(5) == 0
    require_equal(server, journal.path)
    assert "training goes on" in caplog.text


def test_what_stays_unsent_is_counted_and_said(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeMlflow()
    server.is_down = True
    with contextlib.closing(Journal(journal.path, resume_step=0)) as stage:
        write(stage, range(1, 6))
        stage.saved(3)
    assert MlflowForwarder(journal.path, server.open, poll_s=0.01).close(0.1) == 3
    assert "3 journal lines have not reached MLflow" in caplog.text
    assert "2 journal lines past the last checkpoint" in caplog.text


def test_a_changed_param_becomes_a_tag(journal: Journal) -> None:
    server = FakeMlflow()
    journal.params({"lr": 1e-3, "seed": 0})
    journal.params({"lr": 2e-3, "seed": 0})
    journal.tags({"checkpoint": "step-00000010"})
    journal.flush()
    copy(server, journal)
    assert server.run.params == {"lr": "0.001", "seed": "0"}
    assert server.run.tags == {"changed.lr": "0.002", "checkpoint": "step-00000010", FORWARDED: "3"}


def test_a_real_run_holds_every_point_once(tmp_path: Path, journal: Journal) -> None:
    runs = MlflowRuns(sqlite_uri(tmp_path / "mlflow.db"), "svitt-ego", tmp_path / "artifacts")
    run_id = runs.ensure("real", "stage 1")
    journal.params({"stage": {"num_frames": 4}})
    write(journal, range(1, 700))
    journal.metrics(700, {"loss": math.nan, "lr": math.inf})
    journal.flush()
    for _ in range(2):
        JournalCopy(journal.path, lambda outdated=None: (runs.client, run_id)).send()
        runs.client.delete_tag(run_id, FORWARDED)  # so that the next one sends everything again
    expected = points_of(valid_records(journal.path))
    for name in ("loss", "lr"):
        history = runs.client.get_metric_history(run_id, name)
        assert [m.step for m in history] == list(range(1, 701))
        assert [(m.key, m.step, m.timestamp) for m in history] == [p[:3] for p in expected if p[0] == name]
    assert runs.client.get_run(run_id).data.params == {"stage.num_frames": "4"}
