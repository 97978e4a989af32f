"""A hard limit on the memory of the device, so that "fits in 8 GiB" is a test that a machine without a GPU can run too.

On the CPU, torch's allocator is replaced for the whole process, once and for good, by one that counts the bytes of
tensors, refuses with torch.OutOfMemoryError what would pass the limit, and fails on demand. What stands for host
memory (states of an offloaded optimizer) is booked apart and not limited. A byte counts as it was asked for; a GPU
rounds every tensor up to 512 bytes.

Not counted on the CPU:

* tensors that were there before the first `device_budget`;
* memory that torch did not allocate: `from_numpy`, `frombuffer`, files mapped by `torch.load(mmap=True)` or
  safetensors, shared memory (batches of a loader's workers), buffers of gloo;
* scratch memory of kernels that comes from malloc. Measured with torch 2.13 on 2 cores, forward and backward: once
  used, MKL and oneDNN keep 15 to 30 MiB; beyond that, fp32 matmul, LayerNorm, attention (torch's and ours) and fused
  AdamW take less than 0.1 MiB, the patch convolution 2 MiB. But on a CPU without bf16 instructions a bf16 product
  copies one operand (a Linear's weight) to fp32: 4 bytes for each element, while the call lasts.

On CUDA, torch limits what its caching allocator reserves, which is more than what tensors hold. CUDA's context
(some 0.5 GiB) comes on top.

Torch is imported at the first use, so that settings can read amounts of memory without it.
"""

import contextlib
import ctypes
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from decimal import Decimal
from typing import TYPE_CHECKING, Protocol

from infra.accounting_allocator import AllocatorBuildError, load_allocator

if TYPE_CHECKING:
    import torch

_UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}
_DEVICE, _HOST = 0, 1  # pools of the allocator
# What torch raises as a plain RuntimeError: its own CPU allocator, and CUDA memory outside the caching allocator.
_OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class MemoryBudgetError(Exception):
    """A budget that cannot be kept on this device; the message says why and what would help."""


class Budget(Protocol):
    """Memory of one device in this process: what tensors hold, what they may hold."""

    @property
    def limit_bytes(self) -> int | None:
        """None: whatever the device has."""
        ...

    def live_bytes(self) -> int:
        """Bytes that tensors hold on the device now."""
        ...

    def peak_bytes(self) -> int:
        """The most that was held at once since the last `reset_peak`; allocations that failed do not count."""
        ...

    def reset_peak(self) -> None:
        """Let `peak_bytes` and `host_peak_bytes` begin anew from what is live."""
        ...

    def fail_allocation(self, number: int, at_least_bytes: int = 1) -> None:
        """Let the `number`-th device allocation from now on, of those of at least so many bytes, fail once.

        Every thread's allocations count. 0 takes back what was told before.
        """
        ...

    def on_host(self) -> AbstractContextManager[None]:
        """Within the `with` block, what this thread allocates belongs to the host: counted apart, not limited.

        A storage that is resized belongs to where it is resized, wherever it was made.
        """
        ...

    def keep_thread_on_host(self) -> None:
        """As `on_host`, for the rest of this thread's life: loaders work in threads of their own."""
        ...

    def move_to_host(self, tensor: "torch.Tensor") -> bool:
        """Book a tensor's storage, with all its views, to the host. False for one that is not counted."""
        ...

    def host_bytes(self) -> int | None:
        """Bytes that tensors hold on the host now; None where they are not counted."""
        ...

    def host_peak_bytes(self) -> int | None:
        """The most that was held on the host at once; None where it is not counted."""
        ...


def device_budget(device: "torch.device", limit_bytes: int | None) -> Budget:
    """Limit the memory of `device` in this process from now on; None lifts the limit.

    On the CPU the first call starts the counting, so call it before the model is built; it needs a C++ compiler,
    once per machine. All budgets of one device share its counts and the newest limit. A limit below what is live
    refuses every allocation until enough was freed. Raises MemoryBudgetError.
    """
    if limit_bytes is not None and limit_bytes <= 0:
        raise MemoryBudgetError(
            f"a memory limit of {limit_bytes} bytes; it must be above 0, or None for no limit"
        )
    if device.type == "cpu":
        return _CpuBudget(limit_bytes)
    if device.type == "cuda":
        return _CudaBudget(device, limit_bytes)
    raise MemoryBudgetError(f"memory of a {device.type} device cannot be limited; use cpu or cuda")


def parse_memory(text: str) -> int:
    """Bytes of a text such as 8GiB, 1.5 GiB, 512MiB, 8GB or 512MB (GB and MB are decimal).

    Raises ValueError, as validators of settings do.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in _UNITS:
        raise ValueError(
            f"{text!r} is no amount of memory; write a number and one of {', '.join(_UNITS)}, as 8GiB"
        )
    num_bytes = int(Decimal(found[1]) * _UNITS[found[2]])
    if num_bytes == 0:
        raise ValueError(f"{text!r} is no memory at all; write more than 0 bytes, as 8GiB")
    return num_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised it because memory did not suffice, on the CPU or a GPU, under a budget or not."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


class _CpuBudget:
    """The process's CPU tensors; all state lives in the allocator."""

    def __init__(self, limit_bytes: int | None) -> None:
        try:
            self._allocator: ctypes.CDLL = load_allocator()
        except AllocatorBuildError as error:
            raise MemoryBudgetError(f"CPU memory cannot be counted: {error}") from error
        obstacle: bytes | None = self._allocator.svitt_budget_install()
        if obstacle is not None:
            raise MemoryBudgetError(f"CPU memory cannot be counted: {obstacle.decode()}")
        self._allocator.svitt_budget_set_limit(-1 if limit_bytes is None else limit_bytes)

    @property
    def limit_bytes(self) -> int | None:
        limit: int = self._allocator.svitt_budget_limit()
        return None if limit < 0 else limit

    def live_bytes(self) -> int:
        return self._allocator.svitt_budget_live(_DEVICE)

    def peak_bytes(self) -> int:
        return self._allocator.svitt_budget_peak(_DEVICE)

    def reset_peak(self) -> None:
        self._allocator.svitt_budget_reset_peaks()

    def fail_allocation(self, number: int, at_least_bytes: int = 1) -> None:
        if number < 0 or at_least_bytes < 1:
            raise ValueError(
                f"allocation {number} of at least {at_least_bytes} bytes cannot fail; the number starts at 1 "
                "(0 takes it back) and so do the bytes"
            )
        self._allocator.svitt_budget_fail(number, at_least_bytes)

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        self._allocator.svitt_budget_enter_host()
        try:
            yield
        finally:
            self._allocator.svitt_budget_leave_host()

    def keep_thread_on_host(self) -> None:
        self._allocator.svitt_budget_enter_host()

    def move_to_host(self, tensor: "torch.Tensor") -> bool:
        import torch

        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return False
        return self._allocator.svitt_budget_move_to_host(tensor.untyped_storage()._cdata)

    def host_bytes(self) -> int | None:
        return self._allocator.svitt_budget_live(_HOST)

    def host_peak_bytes(self) -> int | None:
        return self._allocator.svitt_budget_peak(_HOST)


class _CudaBudget:
    """One GPU, by torch's own limit and counts. The host is another memory, which nobody counts."""

    def __init__(self, device: "torch.device", limit_bytes: int | None) -> None:
        import torch

        self._cuda = torch.cuda
        index = self._cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._limit_bytes = limit_bytes
        total = self._cuda.get_device_properties(self._device).total_memory
        if limit_bytes is not None and limit_bytes > total:
            raise MemoryBudgetError(
                f"a memory limit of {limit_bytes / 2**30:.2f} GiB, but {self._device} has {total / 2**30:.2f} GiB; "
                "set a lower limit or none"
            )
        fraction = 1.0 if limit_bytes is None else limit_bytes / total
        self._cuda.set_per_process_memory_fraction(fraction, self._device)

    @property
    def limit_bytes(self) -> int | None:
        return self._limit_bytes

    def live_bytes(self) -> int:
        return self._cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        return self._cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        self._cuda.reset_peak_memory_stats(self._device)

    def fail_allocation(self, number: int, at_least_bytes: int = 1) -> None:
        raise MemoryBudgetError(
            "allocations can be told to fail on the CPU only; a GPU takes a lower limit instead"
        )

    def on_host(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def keep_thread_on_host(self) -> None:
        return None

    def move_to_host(self, tensor: "torch.Tensor") -> bool:
        return False

    def host_bytes(self) -> int | None:
        return None

    def host_peak_bytes(self) -> int | None:
        return None
