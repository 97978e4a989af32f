"""The loop over optimizer steps: train, log at intervals, save when due, leave when asked to.

Knows no framework: it is handed built objects and calls them. What one step computes stands in `train_step`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jobs.ranks import Ranks
from pipeline.errors import ClipError
from pipeline.loader import Batch


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to change."""


class NonFiniteError(TrainingError):
    """A loss or gradient of a step is not finite on some rank: raised on all of them, before the weights change."""


class HalvedError(TrainingError):
    """The stage has to start again with half the micro-batch, which stands in its ledger."""


class RollbackError(TrainingError):
    """The stage has to go on from an earlier checkpoint, behind steps that are left out from now on."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Means over an interval of what optimizer steps measure; a step hands them over as one tensor in this order."""

    loss: float
    vtc: float
    vtm: float
    mlm: float
    grad_norm: float


@dataclass(frozen=True, slots=True)
class Interval:
    """Means over the steps since the last report, over all ranks.

    `step` counts finished steps; `clips_per_s` is over all ranks; times are milliseconds per step of the slowest rank.
    `losses` holds (step, loss) of each of the `num_steps` steps. The slowest rank is the one the others wait for at the
    beginning of a step, `rank_lag_ms` by how much at the 95th percentile.
    """

    step: int
    metrics: StepMetrics
    learning_rate: float
    clips_per_s: float
    step_ms: float
    data_wait_ms: float
    num_steps: int = 0
    losses: tuple[tuple[int, float], ...] = ()
    rank_lag_ms: float = 0.0
    slowest_rank: int = 0


class LeftOut(Protocol):
    """Steps without an update: see `left_out`."""

    def is_skipped(self, step: int) -> bool: ...

    def damaged(self, step: int, error: ClipError | None) -> None: ...

    def non_finite(
        self, step: int, in_a_row: int, clip_ids: Sequence[str], error: NonFiniteError, saved: int
    ) -> None: ...


@dataclass(frozen=True)
class Hooks:
    """What the loop calls. `save(step, is_last)` is collective, and so is `save_soon`, asked at every report.
    `stop_requested` is asked on every rank before each step, any yes counts; `beat(step)` tells that a step begins.
    """

    train_step: Callable[[int, Batch], Tensor]
    left_out: LeftOut
    report: Callable[[Interval], None]
    save: Callable[[int, bool], None]
    save_soon: Callable[[], bool]
    stop_requested: Callable[[], bool]
    beat: Callable[[int], None]
    clock: Callable[[], float]


@dataclass(frozen=True)
class Pace:
    """When things are due, in steps. `global_batch_size` is in clips."""

    num_steps: int
    log_every_steps: int
    save_every_steps: int
    global_batch_size: int
    learning_rate_at: Callable[[int], float]


class _Meter:
    """Sums of one interval. Losses stay on the device until `reduce`, so that a step never waits for them."""

    def __init__(self) -> None:
        self.metrics: list[Tensor] = []
        self.steps: list[int] = []
        self.busy_s, self.wait_s = 0.0, 0.0
        self.turnouts_s: list[float] = []

    def add(self, step: int, metrics: Tensor, busy_s: float, wait_s: float, turnout_s: float) -> None:
        """`turnout_s`: how long this rank waited for the others to come to the step."""
        self.metrics.append(metrics.clone())
        self.steps.append(step)
        self.busy_s, self.wait_s = self.busy_s + busy_s, self.wait_s + wait_s
        self.turnouts_s.append(turnout_s)

    def reduce(self, step: int, pace: Pace, ranks: Ranks) -> Interval:
        num_steps = len(self.steps)
        metrics_SM = torch.stack(self.metrics)
        reduced = ranks.mean([*metrics_SM.mean(0).tolist(), *metrics_SM[:, 0].tolist()])
        means, losses = reduced[: metrics_SM.shape[1]], reduced[metrics_SM.shape[1] :]
        busy_ms, wait_ms = ranks.max([1e3 * self.busy_s / num_steps, 1e3 * self.wait_s / num_steps])
        turnouts = ranks.gather(sorted(self.turnouts_s)[int(0.95 * (num_steps - 1))])
        return Interval(
            step=step,
            metrics=StepMetrics(*means),
            learning_rate=pace.learning_rate_at(step - 1),
            clips_per_s=1e3 * pace.global_batch_size / (busy_ms + wait_ms),
            step_ms=busy_ms + wait_ms,
            data_wait_ms=wait_ms,
            num_steps=num_steps,
            losses=tuple(zip(self.steps, losses, strict=True)),
            rank_lag_ms=1e3 * (max(turnouts) - min(turnouts)),
            slowest_rank=turnouts.index(min(turnouts)),
        )


def fit(
    batches: Iterator[tuple[int, Batch | ClipError]],
    start_step: int,
    pace: Pace,
    hooks: Hooks,
    ranks: Ranks,
) -> int:
    """Trains from `start_step` to the last step, or until stopped. Returns the number of finished steps.

    A step is left out on all ranks where one of them has no whole batch or no finite loss, or where a rollback took it
    out. The state after the last finished step is always saved. Between a step that was not finite and the next one
    that is, nothing is saved: a rollback must find a checkpoint from before.
    """
    finished, saved = start_step, start_step
    bad_in_a_row, is_overdue = 0, False
    meter = _Meter()
    while finished < pace.num_steps:
        hooks.beat(finished)
        asked_s = hooks.clock()
        step, batch = next(batches)
        if step != finished:
            raise TrainingError(f"the loader handed out step {step}, the loop is at step {finished}")
        came_s = hooks.clock()
        is_damaged, is_stopping = ranks.max([isinstance(batch, ClipError), hooks.stop_requested()])
        began_s = hooks.clock()
        if is_stopping:
            break
        if hooks.left_out.is_skipped(step):
            pass
        elif is_damaged:
            hooks.left_out.damaged(step, batch if isinstance(batch, ClipError) else None)
        else:
            assert isinstance(batch, Batch), "no rank has an error"
            try:
                metrics = hooks.train_step(step, batch)
            except NonFiniteError as error:
                bad_in_a_row += 1
                hooks.left_out.non_finite(step, bad_in_a_row, batch.clip_ids, error, saved)
            else:
                bad_in_a_row = 0
                meter.add(step, metrics, hooks.clock() - began_s, came_s - asked_s, began_s - came_s)
        finished += 1

        is_overdue |= finished % pace.save_every_steps == 0
        is_last = finished == pace.num_steps
        if is_overdue or is_last or finished % pace.log_every_steps == 0:
            meter = _report(meter, finished, pace, hooks, ranks)
            is_overdue |= hooks.save_soon()
        if is_last or (is_overdue and not bad_in_a_row):
            hooks.save(finished, is_last)
            saved, is_overdue = finished, False
    if finished > saved:  # stopped
        _report(meter, finished, pace, hooks, ranks)
        hooks.save(finished, True)
    return finished


def _report(meter: _Meter, finished: int, pace: Pace, hooks: Hooks, ranks: Ranks) -> _Meter:
    """Reports an interval that has steps; a new meter either way."""
    if meter.steps:
        hooks.report(meter.reduce(finished, pace, ranks))
    return _Meter()
