"""A step that runs out of memory is done again with half the micro-batch, on all ranks, and computes the same."""

import weakref
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.engine import Engine, EngineError
from infra.memory_budget import device_budget
from jobs import batch_work as module
from jobs.ranks import ProcessGroupRanks, SingleRank
from jobs.train_loop import TrainingError
from jobs.train_step import TrainStep
from model.objective import encode_rows, pair_losses
from tests.infra.two_ranks import run_two
from tests.jobs import gradient_cases as cases


class Shortage:
    """Stands for a part of the model that fails above `limit` rows."""

    def __init__(
        self, part: Any, limit: int, text: str = "DefaultCPUAllocator: can't allocate memory"
    ) -> None:
        self.part, self.limit, self.text = part, limit, text

    def __call__(self, *arguments: Any) -> Any:
        if len(arguments[1]) > self.limit:  # the clips
            raise RuntimeError(self.text)
        return self.part(*arguments)


def _step(engine: Engine, remembered: list[int], micro_batch_size: int | None = None) -> TrainStep:
    return TrainStep(engine, cases.SEED, SingleRank(), lambda _: 1e-3, micro_batch_size, remembered.append)


@pytest.mark.parametrize("part", [encode_rows, pair_losses])
def test_losses_and_weights_are_those_of_a_run_with_the_smaller_micro_batch(
    part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, results = cases.batch(12), []
    for micro_batch_size, limit in ((3, 12), (None, 3)):
        monkeypatch.setattr(module, part.__name__, Shortage(part, limit))
        engine, remembered = cases.engine_of(cases.PLAIN), []
        step = _step(engine, remembered, micro_batch_size)
        losses = [step(number, whole) for number in range(3)]
        results.append((losses, engine.consolidated_state_dict()))
    assert remembered == [6, 3]
    assert step.micro_batch_size == 3
    for plain, after in zip(*(losses for losses, _ in results), strict=True):
        assert torch.equal(plain, after)
    for name, weight in results[0][1].items():
        assert torch.equal(weight, results[1][1][name])


def test_what_failed_is_gone_before_the_step_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def encode(*arguments: Any) -> Any:
        assert not [tensor for tensor in held if tensor() is not None]
        if len(arguments[1]) > 3:
            large = torch.ones(1)
            held.append(weakref.ref(large))
            error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
            raise error  # a cycle: it holds its frame, which holds it
        return encode_rows(*arguments)

    monkeypatch.setattr(module, "encode_rows", encode)
    remembered: list[int] = []
    _step(cases.engine_of(cases.PLAIN), remembered).gradient(0, cases.batch(12))
    assert remembered == [6, 3]
    assert len(held) == 2


def test_a_rehearsal_finds_the_size_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "encode_rows", Shortage(encode_rows, 4))
    engine, remembered = cases.engine_of(cases.PLAIN), []
    step = _step(engine, remembered)
    before = engine.consolidated_state_dict()
    step.rehearse(cases.batch(12))
    assert remembered == [6, 3]
    assert all(torch.equal(weight, before[name]) for name, weight in engine.consolidated_state_dict().items())
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    with pytest.raises(EngineError, match="after 0 backward calls"):
        engine.step(0.0)


def test_the_floor_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "encode_rows", Shortage(encode_rows, 0))
    step = _step(cases.engine_of(cases.PLAIN), [])
    with pytest.raises(TrainingError, match=r"one clip at a time .*can't allocate.*recompute.*zero_stage"):
        step(7, cases.batch(8))


def test_another_error_is_not_taken_for_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "encode_rows", Shortage(encode_rows, 0, text="a bug"))
    remembered: list[int] = []
    with pytest.raises(RuntimeError, match="a bug"):
        _step(cases.engine_of(cases.PLAIN), remembered)(7, cases.batch(8))
    assert not remembered


def one_rank_runs_short(rank: int, _: str) -> None:
    """Rank 1 alone fails in the second pass; both halve, and the gradient is that of the whole batch."""
    whole = cases.batch(12)
    expected = cases.reference(whole)
    if rank == 1:
        module.pair_losses = Shortage(pair_losses, 4)  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("plain", "ZeRO 1", "ZeRO 2", "ZeRO 2 offload"):
        remembered: list[int] = []
        engine = cases.engine_of(cases.ENGINES[name])
        step = TrainStep(
            engine, cases.SEED, ProcessGroupRanks(cases.CPU), lambda _: 1e-3, None, remembered.append
        )
        step.gradient(cases.STEP, cases.part(whole, rank, 2))
        assert remembered == [3], name
        found = engine.gradients()
        total = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
        miss = torch.stack([(found[key] - gradient).norm() for key, gradient in expected[1].items()]).norm()
        assert miss / total < 1e-5, name
    # ZeRO 3 gathers parameters inside the call that fails: no way back, so the stage starts again.
    module.encode_rows = Shortage(encode_rows, 4)  # pyright: ignore[reportAttributeAccessIssue]
    engine, remembered = cases.engine_of(cases.ENGINES["ZeRO 3"]), []
    ranks = ProcessGroupRanks(cases.CPU)
    step = TrainStep(engine, cases.SEED, ranks, lambda _: 1e-3, None, remembered.append)
    with pytest.raises(TrainingError, match="goes on from its last checkpoint with 3"):
        step.gradient(cases.STEP, cases.part(whole, rank, 2))
    assert remembered == [3]


@pytest.mark.dist
def test_ranks_agree(tmp_path: Path) -> None:
    run_two(one_rank_runs_short, "", tmp_path)


def real_shortage() -> None:
    """In a process of its own: its allocator stays replaced. Memory is limited to what 3 clips at once need."""
    torch.set_num_threads(1)
    budget = device_budget(cases.CPU, None)
    whole, peaks, losses = cases.batch(12), [], []
    engine, remembered = cases.engine_of(cases.PLAIN), []
    for size in (1, 6, 3):  # the first time alone brings what stays
        budget.reset_peak()
        losses.append(_step(engine, remembered, size).gradient(0, whole))
        engine.discard()
        peaks.append(budget.peak_bytes())
    device_budget(cases.CPU, (peaks[1] + peaks[2]) // 2)
    after = _step(engine, remembered).gradient(0, whole)
    assert remembered == [6, 3], (remembered, peaks)
    assert torch.equal(after, losses[2])


def shortages_in_the_middle() -> None:
    """An allocation that fails at step 3, and from step 6 on a limit that only 3 clips at once keep."""
    torch.set_num_threads(1)
    budget, whole = device_budget(cases.CPU, None), cases.batch(12)

    def run(size: int | None, before_step: Callable[[int], None]) -> tuple[list[torch.Tensor], list[int]]:
        engine, remembered = cases.engine_of(cases.PLAIN), []
        step = _step(engine, remembered, size)
        losses = []
        for number in range(9):
            before_step(number)
            losses.append(step(number, whole))
        return losses, remembered

    peaks: dict[int, int] = {}
    for size in (6, 3):
        budget.reset_peak()
        calm, _ = run(size, lambda _: None)
        peaks[size] = budget.peak_bytes()

    def disturb(number: int) -> None:
        if number == 3:
            budget.fail_allocation(1500)
        if number == 6:
            device_budget(cases.CPU, (peaks[3] + peaks[6]) // 2)

    disturbed, remembered = run(None, disturb)
    assert remembered == [6, 3], (remembered, peaks)
    for number, (one, other) in enumerate(zip(calm, disturbed, strict=True)):
        torch.testing.assert_close(
            other, one, rtol=1e-5, atol=0, msg=lambda text, n=number: f"step {n}: {text}"
        )


@pytest.mark.parametrize("case", [real_shortage, shortages_in_the_middle])
def test_a_real_limit_is_kept_by_halving(case: Callable[[], None]) -> None:
    process = get_context("spawn").Process(target=case)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_rehearsal_leaves_room_for_what_the_first_update_brings() -> None:
    step = _step(cases.engine_of(cases.PLAIN), [])
    with pytest.raises(TrainingError, match=r"the 1073741824 MiB of the optimizer's moments .*svitt plan"):
        step.rehearse(cases.batch(4), reserved_bytes=2**50)
