"""Steps left out for damaged clips: what the ledger and the metrics hold, and where it ends."""

from collections.abc import Mapping
from typing import Any

import pytest

from infra.ledger import Ledger
from jobs.damaged_steps import DamagedSteps
from jobs.ranks import SingleRank
from jobs.summary import damaged_steps
from jobs.train_loop import TrainingError
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
        self.answers = [None, known]

    def gather(self, value: Any) -> list[Any]:
        return [self.answers.pop(0), value]


def error(clip_id: str) -> ClipError:
    return ClipError(clip_id, Reason.DAMAGED_SHARD, "read frame 0 in shard-00003.tar: checksum differs")


def test_steps_are_counted_over_attempts_once_each_and_the_budget_ends_the_stage(tmp_path):
    ledger, metrics = Ledger(tmp_path / "ledger.jsonl"), Metrics()
    ledger.record_attempt(1, "job-1")
    first = DamagedSteps(ledger, 1, 2, SingleRank(), metrics)
    first(4, error("a"))
    # Killed, and step 4 again in the next attempt: the same step.
    second = DamagedSteps(ledger, 1, 2, SingleRank(), metrics)
    second(4, error("a"))
    second(7, error("b"))
    assert [(step, values["data/damaged_steps"]) for step, values in metrics.found] == [
        (5, 1),
        (5, 1),
        (8, 2),
    ]
    state = ledger.read().stage(1)
    assert (state.status, list(damaged_steps(state))) == ("running", ["4", "7"])
    with pytest.raises(TrainingError) as caught:
        second(9, error("c"))
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
        DamagedSteps(ledger, 1, 1, SecondOfTwo(known), Metrics())(2, None)
    assert not ledger.path.exists()
