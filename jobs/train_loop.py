"""The loop over optimizer steps: train, log at intervals, save when due, leave when asked to.

Knows no framework: it is handed built objects and calls them. What one step computes stands in `train_step`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from jobs.ranks import Ranks
from pipeline.errors import ClipError
from pipeline.loader import Batch


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to change."""


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
    """

    step: int
    metrics: StepMetrics
    learning_rate: float
    clips_per_s: float
    step_ms: float
    data_wait_ms: float


@dataclass(frozen=True)
class Hooks:
    """What the loop calls. `save(step)` is collective; `stop_requested` is asked on every rank, any yes counts.

    `leave_out(step, error)` is collective too: a rank met a damaged clip at this step, `error` on that rank, None on
    the others.
    """

    train_step: Callable[[int, Batch], Tensor]
    leave_out: Callable[[int, ClipError | None], None]
    report: Callable[[Interval], None]
    save: Callable[[int], None]
    stop_requested: Callable[[], bool]
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
        self.sums: Tensor | None = None
        self.steps, self.busy_s, self.wait_s = 0, 0.0, 0.0

    def add(self, metrics: Tensor, busy_s: float, wait_s: float) -> None:
        self.sums = metrics.clone() if self.sums is None else self.sums + metrics
        self.steps, self.busy_s, self.wait_s = self.steps + 1, self.busy_s + busy_s, self.wait_s + wait_s

    def reduce(self, step: int, pace: Pace, ranks: Ranks) -> Interval:
        assert self.sums is not None, "an interval has at least one step"
        means = ranks.mean((self.sums / self.steps).tolist())
        busy_ms, wait_ms = ranks.max([1e3 * self.busy_s / self.steps, 1e3 * self.wait_s / self.steps])
        return Interval(
            step=step,
            metrics=StepMetrics(*means),
            learning_rate=pace.learning_rate_at(step - 1),
            clips_per_s=1e3 * pace.global_batch_size / (busy_ms + wait_ms),
            step_ms=busy_ms + wait_ms,
            data_wait_ms=wait_ms,
        )


def fit(
    batches: Iterator[tuple[int, Batch | ClipError]],
    start_step: int,
    pace: Pace,
    hooks: Hooks,
    ranks: Ranks,
) -> int:
    """Trains from `start_step` to the last step, or until stopped. Returns the number of finished steps.

    A step of which a rank has no whole batch is left out on all of them. The state after the last finished step is
    always saved. Raises TrainingError when a loss is no longer finite; that is found before the next save, so the
    newest checkpoint is from before it.
    """
    finished, saved = start_step, start_step
    meter = _Meter()
    while finished < pace.num_steps:
        asked_s = hooks.clock()
        step, batch = next(batches)
        if step != finished:
            raise TrainingError(f"the loader handed out step {step}, the loop is at step {finished}")
        began_s = hooks.clock()
        if ranks.any(isinstance(batch, ClipError)):
            hooks.leave_out(step, batch if isinstance(batch, ClipError) else None)
        else:
            assert isinstance(batch, Batch), "no rank has an error"
            metrics = hooks.train_step(step, batch)
            meter.add(metrics, busy_s=hooks.clock() - began_s, wait_s=began_s - asked_s)
        finished += 1

        save_due = finished % pace.save_every_steps == 0
        if not (save_due or finished % pace.log_every_steps == 0 or finished == pace.num_steps):
            continue
        if meter.steps:
            interval = meter.reduce(finished, pace, ranks)
            meter = _Meter()
            _require_finite(interval, saved)
            hooks.report(interval)
        stopping = ranks.any(hooks.stop_requested())
        if save_due or stopping or finished == pace.num_steps:
            hooks.save(finished)
            saved = finished
        if stopping:
            break
    return finished


def _require_finite(interval: Interval, saved: int) -> None:
    if not math.isfinite(interval.metrics.loss):
        raise TrainingError(
            f"the loss is {interval.metrics.loss} between step {interval.step} and the report before it "
            f"(terms: {interval.metrics}). Last saved step: {saved}. Lower the learning rate, set "
            f"engine.gradient_clipping, or look at the clips of these steps."
        )
