"""The loop, on scripted losses: what it reports, when it saves, when it leaves, what it refuses."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.ranks import SingleRank
from jobs.train_loop import Hooks, Interval, NonFiniteError, Pace, RollbackError, TrainingError, fit
from pipeline.errors import ClipError, Reason
from pipeline.loader import Batch

# The loop hands it on unseen, but for the names of its clips.
BATCH = Batch.__new__(Batch)
object.__setattr__(BATCH, "clip_ids", ("a", "b"))


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
    errors: dict[int, ClipError] = field(default_factory=dict)
    left_out: list[tuple[int, ClipError | None]] = field(default_factory=list)
    not_finite: tuple[int, ...] = ()
    in_a_row: list[tuple[int, int, int]] = field(default_factory=list)
    most_in_a_row: int = 3
    skipped: tuple[int, ...] = ()
    beats: list[int] = field(default_factory=list)
    notice_at: int | None = None

    def batches(self, first: int) -> Iterator[tuple[int, Batch | ClipError]]:
        while True:
            self.now_s += 1
            self.batches_taken += 1
            yield first, self.errors.get(first, BATCH)
            first += 1

    def train_step(self, step: int, batch: Batch) -> Tensor:
        self.now_s += 3
        if step in self.not_finite:
            raise NonFiniteError(f"step {step}: not finite")
        self.steps.append(step)
        loss = self.losses(step)
        return torch.tensor([loss, 2 * loss, 3 * loss, 4 * loss, 5 * loss])

    def is_skipped(self, step: int) -> bool:
        return step in self.skipped

    def damaged(self, step: int, error: ClipError | None) -> None:
        self.left_out.append((step, error))

    def non_finite(
        self, step: int, in_a_row: int, clip_ids: Sequence[str], error: NonFiniteError, saved: int
    ) -> None:
        self.in_a_row.append((step, in_a_row, saved))
        if in_a_row == self.most_in_a_row:
            raise RollbackError("back")

    def save_soon(self) -> bool:
        is_due = self.notice_at is not None and len(self.steps) >= self.notice_at
        self.notice_at = None if is_due else self.notice_at
        return is_due

    def hooks(self) -> Hooks:
        return Hooks(
            train_step=self.train_step,
            left_out=self,
            report=self.intervals.append,
            save=lambda step, is_last: self.saved.append(step),
            save_soon=self.save_soon,
            stop_requested=lambda: self.stop_at is not None and len(self.steps) >= self.stop_at,
            beat=self.beats.append,
            clock=lambda: self.now_s,
        )


def pace(num_steps: int = 10, log_every_steps: int = 2, save_every_steps: int = 4) -> Pace:
    return Pace(num_steps, log_every_steps, save_every_steps, 8, learning_rate_at=lambda step: step / 10)


class FirstOfTwoRanks(SingleRank):
    """Another rank whose numbers are always 4 larger, but for answers to yes or no."""

    world_size = 2

    def mean(self, values: list[float]) -> list[float]:
        return [value + 2 for value in values]

    def max(self, values: list[float]) -> list[float]:
        return values if set(values) <= {True, False} else [value + 4 for value in values]

    def gather(self, value: Any) -> list[Any]:
        return [value, value + 0.5]


class OtherRankSays(SingleRank):
    """At one step, counted from 1, another rank has a damaged clip or wants to stop; this one does not."""

    def __init__(self, number: int, is_damaged: bool = False, is_stopping: bool = False) -> None:
        self.number, self.asked, self.says = number, 0, [is_damaged, is_stopping]

    def max(self, values: list[float]) -> list[float]:
        if len(values) == 2 and all(isinstance(value, bool) for value in values):
            self.asked += 1
            return self.says if self.asked == self.number else values
        return values


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


def test_a_stop_request_saves_before_the_next_step_and_leaves() -> None:
    seen = Recorder(stop_at=5)
    finished = fit(seen.batches(0), 0, pace(num_steps=100, save_every_steps=50), seen.hooks(), SingleRank())
    assert finished == 5
    assert seen.saved == [5]
    assert seen.steps == [0, 1, 2, 3, 4]
    assert [interval.step for interval in seen.intervals] == [2, 4, 5]


def test_a_stop_right_after_a_save_saves_nothing_twice() -> None:
    seen = Recorder(stop_at=4)
    assert fit(seen.batches(0), 0, pace(num_steps=100), seen.hooks(), SingleRank()) == 4
    assert seen.saved == [4]


def test_a_stop_request_seen_by_another_rank_counts() -> None:
    seen = Recorder()
    ranks = OtherRankSays(3, is_stopping=True)
    assert fit(seen.batches(0), 0, pace(num_steps=100), seen.hooks(), ranks) == 2
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


def test_a_step_that_is_not_finite_is_left_out_and_counts_in_a_row() -> None:
    seen = Recorder(not_finite=(1, 2, 5))
    assert fit(seen.batches(0), 0, pace(num_steps=8, log_every_steps=8), seen.hooks(), SingleRank()) == 8
    assert seen.steps == [0, 3, 4, 6, 7]
    assert seen.in_a_row == [(1, 1, 0), (2, 2, 0), (5, 1, 4)]
    # Losses are the numbers of the steps; those since the save of step 4 make the second interval.
    assert [interval.losses for interval in seen.intervals] == [
        ((0, 0.0), (3, 3.0)),
        ((4, 4.0), (6, 6.0), (7, 7.0)),
    ]


def test_a_save_that_falls_due_among_bad_steps_waits_for_a_good_one() -> None:
    seen = Recorder(not_finite=(3, 4))
    fit(seen.batches(0), 0, pace(num_steps=8, save_every_steps=4), seen.hooks(), SingleRank())
    assert seen.saved == [6, 8]


def test_too_many_bad_steps_in_a_row_roll_back_with_nothing_saved_since() -> None:
    seen = Recorder(not_finite=(5, 6, 7))
    with pytest.raises(RollbackError):
        fit(seen.batches(0), 0, pace(num_steps=20, save_every_steps=4), seen.hooks(), SingleRank())
    assert seen.in_a_row[-1] == (7, 3, 4)
    assert seen.saved == [4]


def test_steps_of_a_skipped_window_are_passed_over_without_a_word() -> None:
    seen = Recorder(skipped=(1, 2, 3))
    assert fit(seen.batches(0), 0, pace(num_steps=6, save_every_steps=3), seen.hooks(), SingleRank()) == 6
    assert seen.steps == [0, 4, 5]
    assert seen.saved == [3, 6]


def test_a_notice_saves_at_the_next_report_and_goes_on() -> None:
    seen = Recorder(notice_at=3)
    assert fit(seen.batches(0), 0, pace(num_steps=8, save_every_steps=50), seen.hooks(), SingleRank()) == 8
    assert seen.saved == [4, 8]


def test_every_step_gives_a_sign_of_life_before_it_begins() -> None:
    seen = Recorder()
    fit(seen.batches(2), 2, pace(num_steps=5), seen.hooks(), SingleRank())
    assert seen.beats == [2, 3, 4]


def test_the_rank_that_the_others_wait_for_is_named() -> None:
    seen = Recorder()
    fit(seen.batches(0), 0, pace(num_steps=2), seen.hooks(), FirstOfTwoRanks())
    # This rank waits 0 s at the 95th percentile, the other one 0.5 s.
    assert (seen.intervals[0].slowest_rank, seen.intervals[0].rank_lag_ms) == (0, 500.0)


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
    seen = Recorder(errors={2: error})
    assert fit(seen.batches(0), 0, pace(5, 5, 5), seen.hooks(), SingleRank()) == 5
    assert seen.left_out == [(2, error)]
    assert seen.steps == [0, 1, 3, 4]
    # Losses are the numbers of the steps: the mean is over the four that were made.
    assert seen.intervals[0].metrics.loss == 2.0


def test_a_damaged_clip_of_another_rank_leaves_the_step_out_here_too() -> None:
    seen = Recorder()
    ranks = OtherRankSays(2, is_damaged=True)
    assert fit(seen.batches(0), 0, pace(num_steps=3, log_every_steps=5), seen.hooks(), ranks) == 3
    assert (seen.steps, seen.left_out) == ([0, 2], [(1, None)])


def test_an_interval_of_left_out_steps_reports_nothing_and_is_saved() -> None:
    error = ClipError("clip", Reason.DAMAGED_SHARD, "checksum differs")
    seen = Recorder(errors={0: error, 1: error})
    fit(seen.batches(0), 0, pace(num_steps=2, log_every_steps=2), seen.hooks(), SingleRank())
    assert (seen.steps, seen.intervals, seen.saved) == ([], [], [2])
