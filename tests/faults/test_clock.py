"""A clock that jumps back an hour decides nothing."""

from collections.abc import Callable
from pathlib import Path

from infra.journal import Journal, metric_history
from infra.ledger import Ledger


def jumping_back() -> Callable[[], float]:
    """Seconds; every reading is an hour before the last."""
    now_s = [1e9]

    def read() -> float:
        now_s[0] -= 3600.0
        return now_s[0]

    return read


def test_the_order_of_a_ledger_is_that_of_its_lines(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", clock=jumping_back())
    ledger.record_attempt(1, "job-1")
    first = ledger.record_start(1, 1)
    ledger.record_stage(1, "running", step=4)
    second = ledger.record_start(1, 1, died_at=6)
    ledger.record_stage(1, "trained", step=8)
    state = ledger.read()
    assert (first, second, state.generation) == (1, 2, 2)
    assert (state.stage(1).status, state.stage(1).facts["step"]) == ("trained", 8)


def test_the_order_of_metrics_is_that_of_steps(tmp_path: Path) -> None:
    clock = jumping_back()
    journal = Journal(tmp_path / "journal.jsonl", 0, clock, generation=1)
    journal.metrics(1, {"loss": 1.0})
    journal.metrics(2, {"loss": 2.0})
    journal.close()
    again = Journal(tmp_path / "journal.jsonl", 1, clock, generation=2)
    again.metrics(2, {"loss": 20.0})
    again.close()
    assert metric_history(tmp_path / "journal.jsonl", "loss") == [(1, 1.0), (2, 20.0)]
