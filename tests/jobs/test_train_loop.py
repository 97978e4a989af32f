"""The loop, on scripted losses: what it reports, when it saves, when it leaves, what it refuses."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.ranks import SingleRank
from jobs.train_loop import Hooks, Interval, Pace, TrainingError, fit
from pipeline.errors import ClipError, Reason
from pipeline.loader import Batch

BATCH = Batch.__new__(Batch)  # the loop hands it on unseen


@dataclass
class Recorder:
    """Hooks that remember. Waiting for a batch takes 1 s of the fake clock, a step 3 s."""

    losses: Callable[[int], float] = float
    stop_at: int | None = None
    now_s: float = 0.0
    steps: list[int] = field(default_factory=list)
    intervals: list[Interval] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    batches_taken: int = 0
    damaged: dict[int, ClipError] = field(default_factory=dict)
    left_out: list[tuple[int, ClipError | None]] = field(default_factory=list)

    def batches(self, first: int) -> Iterator[tuple[int, Batch | ClipError]]:
        while True:
            self.now_s += 1
            self.batches_taken += 1
            yield first, self.damaged.get(first, BATCH)
            first += 1

    def train_step(self, step: int, batch: Batch) -> Tensor:
        self.now_s += 3
        self.steps.append(step)
        loss = self.losses(step)
        return torch.tensor([loss, 2 * loss, 3 * loss, 4 * loss, 5 * loss])

    def hooks(self) -> Hooks:
        return Hooks(
            train_step=self.train_step,
            leave_out=lambda step, error: self.left_out.append((step, error)),
            report=self.intervals.append,
            save=self.saved.append,
            stop_requested=lambda: self.stop_at is not None and len(self.steps) >= self.stop_at,
            clock=lambda: self.now_s,
        )


def pace(num_steps: int = 10, log_every_steps: int = 2, save_every_steps: int = 4) -> Pace:
    return Pace(num_steps, log_every_steps, save_every_steps, 8, learning_rate_at=lambda step: step / 10)


class FirstOfTwoRanks(SingleRank):
    """Another rank whose numbers are always 4 larger."""

    world_size = 2

    def mean(self, values: list[float]) -> list[float]:
        return [value + 2 for value in values]

    def max(self, values: list[float]) -> list[float]:
        return [value + 4 for value in values]


class OtherRankSays(SingleRank):
    """Another rank says yes to one question, counted from 1, to which this one says no."""

    def __init__(self, number: int) -> None:
        self.number, self.asked = number, 0

    def any(self, flag: bool) -> bool:
        self.asked += 1
        return flag or self.asked == self.number


def test_an_interval_holds_the_means_of_its_steps() -> None:
    seen = Recorder()
    assert fit(seen.batches(0), 0, pace(num_steps=4, log_every_steps=2), seen.hooks(), SingleRank()) == 4
    first, second = seen.intervals
    # Losses of steps 0..3 are 0, 1, 2, 3.
    assert (first.step, first.metrics.loss, first.metrics.vtc) == (2, 0.5, 1.0)
    assert (second.step, second.metrics.loss) == (4, 2.5)
    assert (second.metrics.vtm, second.metrics.mlm, second.metrics.grad_norm) == (7.5, 10.0, 12.5)
    # The rate of the last finished step: steps 1 and 3.
    assert (first.learning_rate, second.learning_rate) == (0.1, 0.3)


def test_times_are_per_step_and_the_rate_counts_the_global_batch() -> None:
    seen = Recorder()
    fit(seen.batches(0), 0, pace(num_steps=4), seen.hooks(), SingleRank())
    for interval in seen.intervals:
        assert (interval.data_wait_ms, interval.step_ms, interval.clips_per_s) == (1000, 4000, 2.0)


def test_metrics_are_means_over_ranks_and_times_those_of_the_slowest() -> None:
    seen = Recorder(losses=lambda step: 1.0)
    fit(seen.batches(0), 0, pace(num_steps=2), seen.hooks(), FirstOfTwoRanks())
    (interval,) = seen.intervals
    assert interval.metrics.loss == 3.0
    assert (interval.data_wait_ms, interval.step_ms) == (1004, 1004 + 3004)


def test_it_saves_when_due_and_after_the_last_step() -> None:
    seen = Recorder()
    fit(seen.batches(0), 0, pace(num_steps=10, save_every_steps=4), seen.hooks(), SingleRank())
    assert seen.saved == [4, 8, 10]


def test_a_last_step_that_is_due_is_saved_once() -> None:
    seen = Recorder()
    fit(seen.batches(0), 0, pace(num_steps=8, save_every_steps=4), seen.hooks(), SingleRank())
    assert seen.saved == [4, 8]
    assert seen.steps == list(range(8))


def test_what_is_saved_has_been_reported() -> None:
    seen = Recorder()
    fit(
        seen.batches(0),
        0,
        pace(num_steps=5, log_every_steps=100, save_every_steps=3),
        seen.hooks(),
        SingleRank(),
    )
    assert [interval.step for interval in seen.intervals] == seen.saved == [3, 5]
    # Losses 0, 1, 2 and then 3, 4.
    assert [interval.metrics.loss for interval in seen.intervals] == [1.0, 3.5]


def test_a_stop_request_saves_at_the_next_report_and_leaves() -> None:
    seen = Recorder(stop_at=5)
    finished = fit(seen.batches(0), 0, pace(num_steps=100, save_every_steps=50), seen.hooks(), SingleRank())
    assert finished == 6  # asked for after step 5, looked at every 2 steps
    assert seen.saved == [6]
    assert seen.steps == [0, 1, 2, 3, 4, 5]


def test_a_stop_request_seen_by_another_rank_counts() -> None:
    seen = Recorder()
    # Asked after each of two steps about their batches, then about a stop.
    assert fit(seen.batches(0), 0, pace(num_steps=100), seen.hooks(), OtherRankSays(3)) == 2
    assert seen.saved == [2]


def test_it_goes_on_from_a_start_step_in_the_same_rhythm() -> None:
    seen = Recorder()
    finished = fit(seen.batches(4), 4, pace(num_steps=10, log_every_steps=2), seen.hooks(), SingleRank())
    assert finished == 10
    assert seen.steps == [4, 5, 6, 7, 8, 9]
    assert [interval.step for interval in seen.intervals] == [6, 8, 10]
    assert seen.saved == [8, 10]


def test_a_finished_stage_takes_no_batch() -> None:
    seen = Recorder()
    assert fit(seen.batches(10), 10, pace(num_steps=10), seen.hooks(), SingleRank()) == 10
    assert (seen.batches_taken, seen.saved, seen.intervals) == (0, [], [])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_training_before_the_next_save(bad: float) -> None:
    seen = Recorder(losses=lambda step: bad if step == 6 else 1.0)
    with pytest.raises(TrainingError) as caught:
        fit(seen.batches(0), 0, pace(num_steps=100, save_every_steps=4), seen.hooks(), SingleRank())
    assert seen.saved == [4]
    assert f"the loss is {bad} between step 8 and the report before it" in str(caught.value)
    assert "Last saved step: 4" in str(caught.value)


def test_a_loader_at_another_step_is_refused_before_training_on_it() -> None:
    seen = Recorder()
    with pytest.raises(TrainingError, match="the loader handed out step 3, the loop is at step 4"):
        fit(seen.batches(3), 4, pace(), seen.hooks(), SingleRank())
    assert (seen.steps, seen.saved) == ([], [])


def test_metrics_of_a_step_may_be_overwritten_by_the_next_one() -> None:
    """A step may hand over the same tensor again; the means must not move with it."""
    seen = Recorder()
    shared = torch.zeros(5)

    def step_in_place(step: int, batch: Any) -> Tensor:
        return shared.fill_(float(step))

    hooks = replace(seen.hooks(), train_step=step_in_place)
    fit(seen.batches(0), 0, pace(num_steps=2), hooks, SingleRank())
    assert seen.intervals[0].metrics.loss == 0.5


def test_a_step_with_a_damaged_clip_is_left_out_and_the_next_ones_are_as_ever() -> None:
    error = ClipError("clip", Reason.DAMAGED_SHARD, "checksum differs")
    seen = Recorder(damaged={2: error})
    assert fit(seen.batches(0), 0, pace(5, 5, 5), seen.hooks(), SingleRank()) == 5
    assert seen.left_out == [(2, error)]
    assert seen.steps == [0, 1, 3, 4]
    # Losses are the numbers of the steps: the mean is over the four that were made.
    assert seen.intervals[0].metrics.loss == 2.0


def test_a_damaged_clip_of_another_rank_leaves_the_step_out_here_too() -> None:
    seen = Recorder()
    assert fit(seen.batches(0), 0, pace(num_steps=3, log_every_steps=5), seen.hooks(), OtherRankSays(2)) == 3
    assert (seen.steps, seen.left_out) == ([0, 2], [(1, None)])


def test_an_interval_of_left_out_steps_reports_nothing_and_is_saved() -> None:
    error = ClipError("clip", Reason.DAMAGED_SHARD, "checksum differs")
    seen = Recorder(damaged={0: error, 1: error})
    fit(seen.batches(0), 0, pace(num_steps=2, log_every_steps=2), seen.hooks(), SingleRank())
    assert (seen.steps, seen.intervals, seen.saved) == ([], [], [2])
