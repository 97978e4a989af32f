"""A step whose loss or gradient is not finite changes nothing, and the ones after it are as if it had not been."""

import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_step import fixed_batch, new_step, weights

from infra.journal import NullTracker
from infra.ledger import Ledger
from jobs.left_out import LeftOutSteps
from jobs.ranks import SingleRank
from jobs.train_loop import Hooks, NonFiniteError, Pace, RollbackError, fit
from jobs.train_step import TrainStep


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_leaves_weights_and_moments_as_they_were(value: float) -> None:
    calm, shot, batch = new_step(), new_step(), fixed_batch()
    calm(0, batch)
    shot(0, batch)
    bad = BadLoss(shot, value)
    with pytest.raises(
        NonFiniteError, match=r"step 1: loss or gradient is not finite \(rank 0: loss (nan|inf)"
    ):
        bad(1, batch)
    for step in (2, 3):
        assert torch.equal(calm(step, batch), shot(step, batch))
    after = weights(shot)
    assert all(torch.equal(weight, after[name]) for name, weight in weights(calm).items())


class BadLoss:
    """A step whose gradient is spoiled before it is looked at, as one overflowing clip would do."""

    def __init__(self, step: TrainStep, value: float, bad: frozenset[int] = frozenset({1})) -> None:
        self._step, self._value, self._bad = step, value, bad

    def __call__(self, number: int, batch: Any) -> torch.Tensor:
        whole = self._step.gradient

        def spoiled(step: int, found: Any) -> torch.Tensor:
            losses = whole(step, found)
            if number in self._bad:
                next(self._step.engine.module.parameters()).grad.fill_(self._value)  # type: ignore[union-attr]
                losses = losses * self._value
            return losses

        self._step.gradient = spoiled  # type: ignore[method-assign]
        try:
            return self._step(number, batch)
        finally:
            self._step.gradient = whole  # type: ignore[method-assign]


def test_a_gradient_that_overflows_under_a_finite_loss_is_found() -> None:
    step, batch = new_step(), fixed_batch()
    before = weights(step)
    whole = step.gradient

    def overflowing(number: int, found: Any) -> torch.Tensor:
        losses = whole(number, found)
        next(step.engine.module.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
        return losses

    step.gradient = overflowing  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError):
        step(0, batch)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(step).items())


def trained(
    ledger: Ledger, first: int, step: TrainStep, bad: frozenset[int], saved: dict[int, Any], seen: list[int]
) -> int:
    """The loop over 12 steps, saving every 3."""
    spoiling = BadLoss(step, math.nan, bad)

    def run(number: int, batch: Any) -> torch.Tensor:
        found = spoiling(number, batch)
        seen.append(number)
        return found

    hooks = Hooks(
        train_step=run,
        left_out=LeftOutSteps(ledger, 1, SingleRank(), NullTracker(), 0, 2),
        report=lambda interval: None,
        save=lambda number, is_last: saved.update({number: weights(step)}),
        save_soon=lambda: False,
        stop_requested=lambda: False,
        beat=lambda number: None,
        clock=count().__next__,
    )
    batches = ((number, fixed_batch()) for number in range(first, 100))
    return fit(batches, first, Pace(12, 100, 3, 4, lambda number: 1e-2), hooks, SingleRank())


def test_two_in_a_row_roll_back_to_the_checkpoint_and_leave_the_window_out(tmp_path: Path) -> None:
    ledger, saved, seen = Ledger(tmp_path / "ledger.jsonl"), {}, []
    step = new_step()
    with pytest.raises(RollbackError, match="checkpoint of step 3 and leaves out steps 3 to 5"):
        trained(ledger, 0, step, frozenset({4, 5}), saved, seen)
    assert seen == [0, 1, 2, 3]
    assert list(saved) == [3]
    # The stage starts again from there; what it computes is what a run without these steps computes.
    after, again = {}, []
    restored = new_step()
    for number in (0, 1, 2):
        restored(number, fixed_batch())
    assert trained(ledger, 3, restored, frozenset({4, 5}), after, again) == 12
    assert again == list(range(6, 12))
    reference = new_step()
    for number in (0, 1, 2, *range(6, 12)):
        reference(number, fixed_batch())
    assert all(torch.equal(weight, after[12][name]) for name, weight in weights(reference).items())
