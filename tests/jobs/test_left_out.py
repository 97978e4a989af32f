"""Steps without an update: what the ledger and the metrics hold of them, and where it ends."""

from collections.abc import Mapping
from typing import Any

import pytest

from infra.ledger import Ledger
from jobs.left_out import LeftOutSteps
from jobs.ranks import SingleRank
from jobs.summary import NON_FINITE_STEPS, SKIPPED_WINDOWS, damaged_steps
from jobs.train_loop import NonFiniteError, RollbackError, TrainingError
from pipeline.errors import ClipError, Reason


class Metrics:
    """Remembers what was tracked."""

    def __init__(self) -> None:
        self.found: list[tuple[int, Mapping[str, float]]] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.found.append((step, values))


class SecondOfTwo(SingleRank):
    """Rank 1; rank 0 has met nothing and knows what the ledger says."""

    rank, world_size = 1, 2

    def __init__(self, known: Mapping[str, list[str]]) -> None:
        self.answers = [[], None, known]

    def gather(self, value: Any) -> list[Any]:
        return [self.answers.pop(0), value]


def left_out(ledger: Ledger, ranks: SingleRank, metrics: Any, max_damaged: int = 8) -> LeftOutSteps:
    return LeftOutSteps(ledger, 1, ranks, metrics, max_damaged, max_nonfinite_in_a_row=2)


def error(clip_id: str) -> ClipError:
    return ClipError(clip_id, Reason.DAMAGED_SHARD, "read frame 0 in shard-00003.tar: checksum differs")


def test_steps_are_counted_over_attempts_once_each_and_the_budget_ends_the_stage(tmp_path):
    ledger, metrics = Ledger(tmp_path / "ledger.jsonl"), Metrics()
    ledger.record_attempt(1, "job-1")
    first = left_out(ledger, SingleRank(), metrics, max_damaged=2)
    first.damaged(4, error("a"))
    # Killed, and step 4 again in the next attempt: the same step.
    second = left_out(ledger, SingleRank(), metrics, max_damaged=2)
    second.damaged(4, error("a"))
    second.damaged(7, error("b"))
    assert [(step, values["data/damaged_steps"]) for step, values in metrics.found] == [
        (5, 1),
        (5, 1),
        (8, 2),
    ]
    state = ledger.read().stage(1)
    assert (state.status, list(damaged_steps(state))) == ("running", ["4", "7"])
    with pytest.raises(TrainingError) as caught:
        second.damaged(9, error("c"))
    message = str(caught.value)
    assert "3 steps had damaged clips, loader.max_damaged_steps allows 2" in message
    assert all(f"step {step}: " in message for step in (4, 7, 9))
    assert "shard-00003.tar" in message
    assert "--repair" in message
    assert list(damaged_steps(ledger.read().stage(1))) == ["4", "7", "9"]


def test_a_rank_that_met_nothing_stops_with_the_others_and_writes_nothing(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    known = {"1": ["a"], "2": ["b"]}
    with pytest.raises(TrainingError, match="2 steps had damaged clips"):
        left_out(ledger, SecondOfTwo(known), Metrics(), max_damaged=1).damaged(2, None)
    assert not ledger.path.exists()


def test_a_step_that_was_not_finite_is_kept_with_its_clips(tmp_path):
    ledger, metrics = Ledger(tmp_path / "ledger.jsonl"), Metrics()
    left_out(ledger, SingleRank(), metrics).non_finite(6, 1, ("a", "b"), NonFiniteError("loss nan"), saved=5)
    assert ledger.read().stage(1).facts[NON_FINITE_STEPS] == {"6": {"found": "loss nan", "clips": ["a", "b"]}}
    assert metrics.found == [(7, {"train/nonfinite_steps": 1.0})]


def test_too_many_in_a_row_take_the_window_since_the_checkpoint_out_for_good(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    steps = left_out(ledger, SingleRank(), Metrics())
    assert not any(steps.is_skipped(step) for step in range(20))
    with pytest.raises(RollbackError, match=r"checkpoint of step 5 and leaves out steps 5 to 7"):
        steps.non_finite(7, 2, ("a",), NonFiniteError("loss inf"), saved=5)
    assert ledger.read().stage(1).facts[SKIPPED_WINDOWS] == [[5, 8]]
    again = left_out(ledger, SingleRank(), Metrics())
    assert [step for step in range(20) if again.is_skipped(step)] == [5, 6, 7]
