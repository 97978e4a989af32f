"""The ledger survives torn writes, concurrent writers and replays to one state."""

import json
import logging
import multiprocessing
from pathlib import Path

import pytest

from infra.ledger import FencedError, Ledger, LedgerError, RunState


def test_replaying_the_lines_gives_the_state(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl", clock=lambda: 12.3456)
    ledger.record_run(mlflow_run_id="parent", recipe_hash="abc")
    ledger.record_attempt(0, "run-s0-a1", mlflow_run_id="child")
    ledger.record_stage(0, "trained", checkpoint="step-00000010")
    ledger.record_stage(0, "done", inter=0.75)
    ledger.record_attempt(1, "run-s1-a1")
    ledger.record_stage(1, "failed", reason="worker died")
    ledger.record_attempt(1, "run-s1-a2")
    ledger.record_attempt(1, "run-s1-a2")  # attached again after the controller died
    state = Ledger(ledger.path).read()
    assert state.facts == {"mlflow_run_id": "parent", "recipe_hash": "abc"}
    assert state.stage(0).status == "done"
    assert state.stage(0).facts == {"mlflow_run_id": "child", "checkpoint": "step-00000010", "inter": 0.75}
    assert (state.stage(1).status, state.stage(1).attempts) == ("running", 2)
    assert state.stage(1).job_ids == ("run-s1-a1", "run-s1-a2")
    assert state.stage(2).status == "pending"
    assert json.loads(ledger.path.read_text().splitlines()[0])["time"] == 12.346


def test_a_run_without_a_ledger_has_an_empty_state(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "ledger.jsonl").read() == RunState()


def test_starts_have_generations_over_the_whole_run_and_the_first_own_account_of_their_end(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", clock=lambda: 7.0)
    assert [ledger.record_start(1, 1), ledger.record_start(1, 1, died_at=17), ledger.record_start(2, 1)] == [
        1,
        2,
        3,
    ]
    ledger.record_end(1, 2, "collateral", "connection closed by peer")
    ledger.record_end(1, 2, "error", "rank 1: ValueError: bad")
    ledger.record_end(1, 2, "error", "another one, later")
    ledger.record_preemption(2, 3)
    first, second = ledger.read().stage(1).starts
    assert (first.ended, first.died_at, first.time_s) == (None, None, 7.0)
    assert (second.ended, second.reason, second.died_at) == ("error", "rank 1: ValueError: bad", 17)
    assert ledger.read().stage(2).starts[0].is_preempted
    assert ledger.read().generation == 3
    assert ledger.read().stage(1).status == "pending"


def test_a_start_that_was_replaced_may_change_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    old = ledger.record_start(1, 1)
    with ledger.fenced(old):
        ledger.record_stage(1, "running", step=5)
    ledger.record_start(1, 2)
    with pytest.raises(FencedError, match="start 1 of this run was replaced by start 2"), ledger.fenced(old):
        pytest.fail("it was let in")


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped_and_said(
    cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record_stage(0, "running")
    ledger.record_stage(0, "done")
    ledger.path.write_bytes(ledger.path.read_bytes()[:-cut])
    with caplog.at_level(logging.WARNING):
        assert ledger.read().stage(0).status == "running"
    assert "torn line" in caplog.text
    assert ledger.record_stage(0, "trained").stage(0).status == "trained"
    assert len(ledger.path.read_text().splitlines()) == 2


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record_stage(0, "running")
    ledger.path.write_text("{broken\n" + ledger.path.read_text())
    with pytest.raises(LedgerError, match=r"line 1 is damaged"):
        ledger.read()


def test_an_unknown_status_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="'finished' is none of pending, running"):
        Ledger(tmp_path / "ledger.jsonl").record_stage(0, "finished")  # type: ignore[arg-type]


def append_many(path: Path, stage: int) -> None:
    for i in range(20):
        Ledger(path).record_attempt(stage, f"job-{i}")


def test_events_of_two_processes_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=append_many, args=(path, stage)) for stage in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    state = Ledger(path).read()
    assert (state.num_events, state.stage(0).attempts, state.stage(1).attempts) == (40, 20, 20)
