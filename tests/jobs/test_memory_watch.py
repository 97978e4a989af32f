"""Prediction against measurement while a stage runs, and the loader's share of the host."""

import logging

import pytest
import torch

from infra.memory_budget import MemoryBudgetError
from jobs import memory_watch
from jobs.memory_plan import Prediction
from jobs.memory_watch import MemoryWatch, batches_that_fit, open_budget
from jobs.ranks import SingleRank

MIB = 2**20
PREDICTED = Prediction("backward", 10 * MIB, 20 * MIB, 10 * MIB, 50 * MIB, 5 * MIB, 5 * MIB, 0)


class FakeBudget:
    """Peaks as a test sets them."""

    def __init__(self) -> None:
        self.peak = 0

    def peak_bytes(self) -> int:
        return self.peak


class SlowerRank(SingleRank):
    """Another rank took 8 MiB more."""

    def max(self, values: list[float]) -> list[float]:
        return [value + 8 * MIB for value in values]


def test_a_prediction_that_holds_is_said_once_for_each_peak(caplog: pytest.LogCaptureFixture) -> None:
    budget = FakeBudget()
    watch = MemoryWatch(budget, 7 * MIB, PREDICTED, SingleRank())  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO):
        budget.peak = 107 * MIB
        assert watch.measure() == 100 * MIB
        assert watch.measure() == 100 * MIB
        budget.peak = 102 * MIB + 7 * MIB
        assert watch.measure() == 102 * MIB
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "device memory: predicted 100 MiB (backward), measured 100 MiB (+0.0 %)"
    assert len(said) == 2
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_one_that_is_off_by_more_than_a_tenth_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    budget = FakeBudget()
    budget.peak = 82 * MIB
    watch = MemoryWatch(budget, 0, PREDICTED, SlowerRank())  # type: ignore[arg-type]
    assert watch.measure() == 90 * MIB  # the rank that takes most counts
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "predicted 100 MiB (backward), measured 90 MiB (+11.1 %); svitt plan" in warning.getMessage()


def test_memory_that_cannot_be_counted_matters_only_under_a_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: torch.device, limit_bytes: int | None) -> None:
        raise MemoryBudgetError("no compiler")

    monkeypatch.setattr(memory_watch, "device_budget", fail)
    assert open_budget(torch.device("cpu"), None) == (None, 0)
    assert "neither predicted nor measured: no compiler" in caplog.text
    with pytest.raises(MemoryBudgetError, match="no compiler"):
        open_budget(torch.device("cpu"), "8GiB")


def test_batches_ahead_take_at_most_half_of_the_free_memory(caplog: pytest.LogCaptureFixture) -> None:
    # 100 MiB free: 5 batches of 10 MiB in half of it, of which one is decoded and one in use.
    assert batches_that_fit(3, 10 * MIB, 100 * MIB) == 3
    assert not caplog.records
    assert batches_that_fit(4, 10 * MIB, 100 * MIB) == 3
    assert "4 batches of 10 MiB ahead do not fit in half of the 100 MiB" in caplog.text
    assert batches_that_fit(4, 200 * MIB, 100 * MIB) == 1
