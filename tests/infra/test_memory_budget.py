"""Counts by hand, limits, failures on demand and the host's pool, in a child process; a GPU's budget on a fake.

No GPU has run these: of the CUDA version only its calls are checked.
"""

import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import budget_cases as cases
import pytest
import torch
from budget_cases import CPU, MIB

from infra import accounting_allocator
from infra.memory_budget import MemoryBudgetError, device_budget, is_out_of_memory, parse_memory
from infra.runtime import environment

GIB = 2**30
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh home folder: the allocator is compiled in this run."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("home")
    with environment({"HOME": str(folder)}):
        yield folder


@pytest.fixture(scope="module")
def run(home: Path) -> Iterator[Run]:
    """Runs a function of `budget_cases` in the child."""
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **one_thread) as child:
        yield lambda function, *arguments: child.submit(function, *arguments).result()


@pytest.fixture
def fresh_load() -> Iterator[Callable[[], object]]:
    accounting_allocator.load_allocator.cache_clear()
    yield accounting_allocator.load_allocator
    accounting_allocator.load_allocator.cache_clear()


def test_a_tensor_counts_until_its_last_view_is_gone(run: Run) -> None:
    # before, there, only its view, gone; the peak; after a reset: peak and live with half a MiB
    assert run(cases.one_tensor) == [0, MIB, MIB, 0, MIB, MIB // 2, MIB // 2]


def test_an_empty_tensor_allocates_nothing(run: Run) -> None:
    assert run(cases.empty_tensors) == [0, 0, 0]


def test_memory_stays_aligned_and_whole(run: Run) -> None:
    assert run(cases.alignments_and_values) == ({0}, True)


def test_what_does_not_fit_is_refused_and_work_goes_on(run: Run) -> None:
    refused, numbers, message = run(cases.a_limit_of_10_mebibytes)
    assert refused == [True, True, True]
    assert numbers == [8 * MIB, 8 * MIB, 10 * MIB, 10 * MIB]
    assert message.startswith(
        "memory budget of the CPU device: the allocation does not fit. Asked for 2.50 MiB (2621440 bytes); live are "
    )
    assert "MiB (LIVE bytes); the limit is " in message
    assert message.splitlines()[0].endswith("MiB (LIMIT bytes)")


def test_budgets_of_a_device_share_the_newest_limit(run: Run) -> None:
    assert run(cases.limits_of_two_budgets) == [2**41, 2**41, True, None, False]


def test_a_step_runs_in_its_own_peak_and_not_in_a_byte_less(run: Run) -> None:
    refused, (whole, halves, left) = run(cases.training_at_a_limit)
    assert refused == [False, True, False, True, False]
    # Two outputs of each of the 8 layers, 1 MiB each, wait for backward; gradients of 2 MiB come to be meanwhile.
    assert 16 * MIB <= whole < 20 * MIB
    assert 8 * MIB <= halves < 12 * MIB
    assert left == 0


def test_a_backward_pass_that_runs_out_leaves_nothing_behind(run: Run) -> None:
    assert run(cases.a_backward_pass_that_fails) == ("OutOfMemoryError", 0)


def test_the_third_large_allocation_fails_once(run: Run) -> None:
    # 1, 0.5, 2, 0.9, 1, 1, 4 MiB; then one on the host, and one after the order was taken back
    assert run(cases.failures_on_demand) == [False, False, False, False, True, False, False, False, False]


def test_host_memory_is_booked_apart_and_not_limited(run: Run) -> None:
    live, host, peak, *later = run(cases.host_memory)
    assert (live, host, peak) == (0, 6 * MIB, 6 * MIB)
    assert later[:2] == [0, MIB]  # freed outside of the block
    assert later[2:4] == [MIB // 2, MIB]  # the other thread is not on the host
    assert later[4:] == [0, MIB, MIB, 0]


def test_an_error_ends_the_time_on_the_host(run: Run) -> None:
    assert run(cases.a_failure_within_host_memory)


def test_a_storage_moves_to_the_host_with_its_views(run: Run) -> None:
    moved, numbers = run(cases.moves_to_host)
    # what torch did not allocate, shared memory, nothing, a tensor from before, sparse, meta
    assert moved == [True, True, False, False, False, False, False, False]
    assert numbers == [0, 4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB, 0, 0, 0]


def test_memory_freed_by_another_thread_is_counted(run: Run) -> None:
    assert run(cases.frees_in_another_thread) == [0, 3 * MIB]


def test_counts_and_limit_hold_under_many_threads(run: Run) -> None:
    assert run(cases.many_threads) == (0, True, True, 1)


def test_every_way_to_a_storage_is_counted_unless_torch_did_not_allocate_it(run: Run, tmp_path: Path) -> None:
    found = run(cases.storages, str(tmp_path))
    uncounted = {"mapped load", "resized to 0", "tensor on a numpy array", "shared"}
    assert {name for name, (there, _) in found.items() if there == 0} == uncounted
    assert found.pop("grown") == [2 * MIB, 0]
    assert {there for there, _ in found.values()} == {0, MIB}
    assert {gone for _, gone in found.values()} == {0}


def test_what_the_machine_cannot_give_is_recognised_and_not_counted(run: Run) -> None:
    assert run(cases.more_than_the_machine_has) == ("RuntimeError", True, [0, 0])


def test_another_allocator_is_not_overridden(run: Run) -> None:
    assert run(cases.over_another_allocator).endswith("another library has replaced torch's CPU allocator")


def test_the_allocator_is_compiled_again_when_damaged_and_else_once(
    run: Run,
    home: Path,
    fresh_load: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run(cases.empty_tensors)
    [library] = (home / ".cache" / "svitt-ego").glob("*.so")
    kept = library.rename(library.with_suffix(".kept"))
    library.write_text("no library")  # a new file: the child has the old one in use
    monkeypatch.setattr(accounting_allocator, "_compile", lambda compiler, path: shutil.copy(kept, path))
    fresh_load()
    assert f"building the accounting allocator again: {library} is damaged" in caplog.text
    accounting_allocator.load_allocator.cache_clear()
    monkeypatch.setattr(accounting_allocator, "_compile", None)
    fresh_load()


def test_without_a_compiler_the_reason_is_said(
    fresh_load: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        MemoryBudgetError,
        match=r"CPU memory cannot be counted: no C\+\+ compiler found .*apt-get install g\+\+",
    ):
        device_budget(CPU, GIB)


def test_a_source_that_does_not_compile_shows_what_the_compiler_said(
    home: Path, tmp_path: Path, fresh_load: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("#include <no_such_header.h>\n")
    monkeypatch.setattr(accounting_allocator, "_SOURCE", source)
    with pytest.raises(MemoryBudgetError, match=r"could not compile (?s:.*)no_such_header"):
        device_budget(CPU, GIB)


def test_amounts_are_read_without_torch() -> None:
    program = (
        "import sys; from infra.memory_budget import parse_memory; parse_memory('1GiB'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * GIB),
        ("1.5 GiB", 3 * GIB // 2),
        (" 512MiB ", 512 * MIB),
        ("8GB", 8 * 10**9),
        ("0.1MB", 100_000),
    ],
)
def test_amounts_of_memory_are_read(text: str, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "8", "8G", "8gib", "GiB", "-1GiB", "1e3MiB", "8 GiB left", "8TiB"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"is no amount of memory; write a number and one of GiB, MiB, GB, MB"
    ):
        parse_memory(text)


def test_no_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="is no memory at all"):
        parse_memory("0.0GiB")
    with pytest.raises(MemoryBudgetError, match="must be above 0, or None"):
        device_budget(CPU, 0)
    with pytest.raises(MemoryBudgetError, match="memory of a meta device cannot be limited"):
        device_budget(torch.device("meta"), GIB)


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    text = (
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    )
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError(text))


class FakeCuda:
    """A GPU of 8 GiB that keeps what it was told."""

    def __init__(self) -> None:
        self.fractions: list[tuple[float, int]] = []
        self.peak = 5

    def current_device(self) -> int:
        return 1

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(total_memory=8 * GIB)

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        self.fractions.append((fraction, device.index))

    def memory_allocated(self, device: torch.device) -> int:
        return 3

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.memory_allocated(device)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in (name for name in dir(fake) if callable(getattr(fake, name)) and not name.startswith("_")):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_a_gpu_gets_its_share_and_tells_its_counts(cuda: FakeCuda) -> None:
    budget = device_budget(torch.device("cuda"), 2 * GIB)
    device_budget(torch.device("cuda", 0), None)
    assert cuda.fractions == [(0.25, 1), (1.0, 0)]
    assert (budget.limit_bytes, budget.live_bytes(), budget.peak_bytes()) == (2 * GIB, 3, 5)
    budget.reset_peak()
    assert budget.peak_bytes() == 3
    with budget.on_host():
        tensor = torch.empty(1)
    assert not budget.move_to_host(tensor)
    assert budget.host_bytes() is budget.host_peak_bytes() is None


def test_a_gpu_refuses_what_it_cannot_do(cuda: FakeCuda) -> None:
    with pytest.raises(MemoryBudgetError, match=r"a memory limit of 9\.00 GiB, but cuda:1 has 8\.00 GiB"):
        device_budget(torch.device("cuda"), 9 * GIB)
    assert not cuda.fractions
    with pytest.raises(MemoryBudgetError, match="on the CPU only"):
        device_budget(torch.device("cuda"), 8 * GIB).fail_allocation(1, 1)
