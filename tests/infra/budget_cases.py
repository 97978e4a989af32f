"""What runs in a child process with a memory budget: torch's allocator cannot be put back. Results are numbers."""

import copy
import ctypes
import io
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from infra.memory_budget import Budget, MemoryBudgetError, device_budget, is_out_of_memory

CPU = torch.device("cpu")
MIB = 2**20
EARLY = torch.zeros(1000)  # there before the counting starts


class Counts:
    """A budget's counts relative to where a case began."""

    def __init__(self, room_bytes: int | None = None) -> None:
        self.budget: Budget = device_budget(CPU, None)
        self.start, self.host_start = self.budget.live_bytes(), self.budget.host_bytes() or 0
        self.limit(room_bytes)
        self.budget.reset_peak()

    def limit(self, room_bytes: int | None) -> None:
        self.budget = device_budget(CPU, None if room_bytes is None else self.start + room_bytes)

    @property
    def live(self) -> int:
        return self.budget.live_bytes() - self.start

    @property
    def peak(self) -> int:
        return self.budget.peak_bytes() - self.start

    @property
    def host(self) -> int:
        return (self.budget.host_bytes() or 0) - self.host_start

    @property
    def host_peak(self) -> int:
        return (self.budget.host_peak_bytes() or 0) - self.host_start


def mebibytes(number: float) -> Tensor:
    return torch.empty(int(number * MIB), dtype=torch.uint8)


def fails(allocate: Callable[[], object]) -> bool:
    """Whether it is refused, as torch.OutOfMemoryError."""
    try:
        allocate()
    except torch.OutOfMemoryError:
        return True
    return False


def one_tensor() -> list[int]:
    counts = Counts()
    seen = [counts.live]
    tensor = torch.ones(MIB // 4)
    view = tensor[10:]
    seen.append(counts.live)
    del tensor
    seen.append(counts.live)
    del view
    seen += [counts.live, counts.peak]
    counts.budget.reset_peak()
    half = mebibytes(0.5)
    seen += [counts.peak, counts.live]
    del half
    return seen


def empty_tensors() -> list[int]:
    counts = Counts()
    kept = [torch.empty(0), torch.empty(3, 0)]
    return [counts.live, counts.peak, kept[0].data_ptr()]


def alignments_and_values() -> tuple[set[int], bool]:
    sizes = [*range(1, 300), 4095, 4096, 4097, MIB, 3 * MIB + 1]
    tensors = [torch.full((size,), size % 251, dtype=torch.uint8) for size in sizes]
    whole = all(bool((tensor == size % 251).all()) for size, tensor in zip(sizes, tensors, strict=True))
    return {tensor.data_ptr() % 64 for tensor in tensors}, whole


def a_limit_of_10_mebibytes() -> tuple[list[bool], list[int], str]:
    counts = Counts(10 * MIB)
    kept = mebibytes(8)
    refused = [fails(lambda: mebibytes(4))]
    message = ""
    try:
        mebibytes(2.5)
    except torch.OutOfMemoryError as error:
        message = str(error)
    numbers = [counts.live, counts.peak]
    del kept
    refused.append(fails(lambda: torch.empty(10 * MIB + 1, dtype=torch.uint8)))
    full = mebibytes(10)
    refused.append(fails(lambda: torch.empty(1, dtype=torch.uint8)))
    numbers += [counts.live, counts.peak]
    del full
    message = message.replace(f"{counts.start + 8 * MIB} bytes", "LIVE bytes")
    message = message.replace(f"{counts.start + 10 * MIB} bytes", "LIMIT bytes")
    return refused, numbers, message


def limits_of_two_budgets() -> list[int | bool | None]:
    first = device_budget(CPU, 2**40)
    second = device_budget(CPU, 2**41)
    seen: list[int | bool | None] = [first.limit_bytes, second.limit_bytes]
    kept = mebibytes(1)
    device_budget(CPU, 1)  # below what is live
    seen.append(fails(lambda: torch.empty(1)))
    device_budget(CPU, None)
    seen += [first.limit_bytes, fails(kept.clone)]
    return seen


def training_at_a_limit() -> tuple[list[bool], list[int]]:
    """Steps of a small network at several limits: which were refused; peaks over what rests, of a whole batch and of
    halves, and what is left.
    """
    counts = Counts()
    network = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(8)))
    data = torch.randn(1024, 256)
    resting = counts.live

    def step(num_parts: int) -> None:
        try:
            for part in data.chunk(num_parts):
                network(part).sum().backward()
        finally:
            network.zero_grad()

    def peak_of(num_parts: int) -> int:
        counts.budget.reset_peak()
        step(num_parts)
        return counts.peak

    whole, halves = peak_of(1), peak_of(2)
    refused = []
    for room, num_parts in ((whole, 1), (whole - 1, 1), (halves, 2), (halves, 1), (whole, 1)):
        counts.limit(room)
        refused.append(fails(lambda num_parts=num_parts: step(num_parts)))
    counts.limit(None)
    return refused, [whole - resting, halves - resting, counts.live - resting]


def a_backward_pass_that_fails() -> tuple[str, int]:
    counts = Counts()
    weight = torch.randn(512, 512, requires_grad=True)
    loss = (weight @ weight).sum()
    before = counts.live
    counts.budget.fail_allocation(2, MIB)
    name = ""
    try:
        loss.backward()
    except Exception as error:
        name = type(error).__name__ if is_out_of_memory(error) else "not recognised"
    weight.grad = None
    return name, counts.live - before


def failures_on_demand() -> list[bool]:
    budget = Counts().budget
    budget.fail_allocation(3, MIB)
    refused = [fails(lambda size=size: mebibytes(size)) for size in (1, 0.5, 2, 0.9, 1, 1, 4)]
    budget.fail_allocation(1)
    with budget.on_host():
        refused.append(fails(lambda: mebibytes(1)))
    budget.fail_allocation(0)
    return [*refused, fails(lambda: mebibytes(1))]


def host_memory() -> list[int]:
    counts = Counts(MIB)
    with counts.budget.on_host():
        states = mebibytes(6)
        with counts.budget.on_host():
            del states
            states = mebibytes(5)
        more = mebibytes(1)
    seen = [counts.live, counts.host, counts.host_peak]
    del states
    seen += [counts.live, counts.host]
    with counts.budget.on_host():
        device_tensors: list[Tensor] = []
        thread = threading.Thread(target=lambda: device_tensors.append(mebibytes(0.5)))
        thread.start()
        thread.join()
        seen += [counts.live, counts.host]
        del device_tensors[:]  # booked where it was allocated, not where it is freed
    counts.budget.reset_peak()
    seen += [counts.live, counts.host, counts.host_peak]
    del more
    return [*seen, counts.host]


def a_failure_within_host_memory() -> bool:
    """An error leaves the `with` block as it should: afterwards the device is charged again."""
    counts = Counts()
    try:
        with counts.budget.on_host():
            raise KeyError
    except KeyError:
        kept = mebibytes(1)
    return counts.live == len(kept)


def moves_to_host() -> tuple[list[bool], list[int]]:
    counts = Counts(5 * MIB)
    tensor = mebibytes(4)
    moved = [counts.budget.move_to_host(tensor[5:7]), counts.budget.move_to_host(tensor)]
    numbers = [counts.live, counts.host, counts.host_peak, counts.peak]
    room = mebibytes(4)
    numbers.append(counts.live)
    del tensor
    numbers.append(counts.host)
    foreign = torch.from_numpy(np.zeros(MIB, np.uint8))
    shared = mebibytes(0.5).share_memory_()
    for other in (
        foreign,
        shared,
        torch.empty(0),
        EARLY,
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
    ):
        moved.append(counts.budget.move_to_host(other))
    return moved, [*numbers, counts.host, counts.live - len(room)]


def frees_in_another_thread() -> list[int]:
    counts = Counts()
    tensors = [mebibytes(1), mebibytes(2)]
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    return [counts.live, counts.peak]


def many_threads() -> tuple[int, bool, bool, int]:
    """Live bytes at the end; whether the limit held, and was met; how often an ordered failure hit."""
    counts = Counts(2 * MIB)
    refusals: list[str] = []

    def work(seed: int) -> None:
        sizes = random.Random(seed)
        kept: dict[int, Tensor] = {}
        for turn in range(1500):
            size = sizes.randint(1, MIB)
            try:
                kept[turn % 3] = torch.empty(size, dtype=torch.uint8)
            except torch.OutOfMemoryError as error:
                kept.clear()
                refusals.append(str(error))

    counts.budget.fail_allocation(2000)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ordered = sum("told to fail" in text for text in refusals)
    return counts.live, counts.peak <= 2 * MIB, len(refusals) > ordered, ordered


def storages(folder: str) -> dict[str, list[int]]:
    """For every way to a tensor of 1 MiB: live bytes while it is there, and after it is gone."""
    source = torch.ones(MIB // 4)
    plain, old, file = pickle.dumps(source), io.BytesIO(), Path(folder) / "tensor.pt"
    torch.save(source, file)
    torch.save(source, old, _use_new_zipfile_serialization=False)

    def resized(*sizes: int) -> Tensor:
        tensor = torch.ones(MIB // 4)
        for size in sizes:
            tensor.untyped_storage().resize_(size)
        return tensor

    def written_lazy_clone() -> Tensor:
        return torch._lazy_clone(source).add_(1)  # pyright: ignore[reportPrivateImportUsage]

    makers: dict[str, Callable[[], object]] = {
        "clone": source.clone,
        "deepcopy": lambda: copy.deepcopy(source),
        "deepcopy of a parameter": lambda: copy.deepcopy(nn.Parameter(source)),
        "UntypedStorage": lambda: torch.UntypedStorage(MIB),
        "pickle": lambda: pickle.loads(plain),
        "load": lambda: torch.load(file),
        "load of the old format": lambda: torch.load(io.BytesIO(old.getvalue())),
        "mapped load": lambda: torch.load(file, mmap=True),
        "resized to 0": lambda: resized(0),
        "resized to 0 and back": lambda: resized(0, MIB),
        "grown": lambda: resized(2 * MIB),
        "numpy view of a tensor": lambda: torch.ones(MIB // 4).numpy(),
        "tensor on a numpy array": lambda: torch.from_numpy(np.ones(MIB // 4, np.float32)),
        "copy of a numpy array": lambda: torch.tensor(np.ones(MIB // 4, np.float32)),
        "shared": lambda: torch.ones(MIB // 4).share_memory_(),
        "written lazy clone": written_lazy_clone,
    }
    found = {}
    for name, make in makers.items():
        counts = Counts()
        made = make()
        there = counts.live
        del made
        found[name] = [there, counts.live]
    counts = Counts()
    EARLY.untyped_storage().resize_(MIB)  # its first 4000 bytes were never counted
    there = counts.live
    EARLY.untyped_storage().resize_(0)
    found["early storage that grows"] = [there, counts.live]
    return found


def more_than_the_machine_has() -> tuple[str, bool, list[int]]:
    counts = Counts()
    try:
        torch.empty(2**50, dtype=torch.uint8)
    except RuntimeError as error:
        return type(error).__name__, is_out_of_memory(error), [counts.live, counts.peak]
    return "no error", False, []


def over_another_allocator() -> str:
    """Torch's other allocator stands for that of another library."""
    c10 = ctypes.CDLL("libc10.so")
    other, standard = c10._ZN3c1028GetDefaultMobileCPUAllocatorEv, c10._ZN3c1022GetDefaultCPUAllocatorEv
    replace = c10._ZN3c1015SetCPUAllocatorEPNS_9AllocatorEh
    other.restype = standard.restype = ctypes.c_void_p
    replace.argtypes = (ctypes.c_void_p, ctypes.c_uint8)
    replace(other(), 255)
    try:
        device_budget(CPU, None)
    except MemoryBudgetError as error:
        return str(error)
    finally:
        replace(standard(), 255)
    return "no error"
