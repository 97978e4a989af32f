"""The measuring process of `svitt bench model`: one request as JSON on the command line, one answer as JSON on stdout.

A process of its own, because allocator settings and high-water marks belong to a process.
"""

import ctypes
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from jobs.bench_cases import ON_CPU, Case, Setup, Step, build

# Timing wants freed memory kept, memory wants it handed back at once (glibc; others ignore it).
TIMING_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}


def measure_times(cases: list[Case], num_samples: int, setup: Setup = ON_CPU) -> dict[str, Any]:
    """Wall and process CPU seconds of every case, taken in turn (A B C A B C) after steps to warm up. On a GPU, whose
    memory is counted by allocation, the peaks of all cases too.
    """
    steps = [build(case, setup) for case in cases]
    samples: list[list[tuple[float, float]]] = [[] for _ in cases]
    # On a GPU the first step compiles kernels and fills the allocator's cache, which the second finds.
    for step in steps if setup.device == "cpu" else steps * 2:
        step()
    for _ in range(num_samples):
        for step, taken in zip(steps, samples, strict=True):
            _finish(setup)
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            _finish(setup)
            taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    answer: dict[str, Any] = {"samples": samples, "matmul_flops_per_s": _matmul_rate(setup)}
    if setup.device != "cpu":
        answer["peak_bytes"] = [_peak_on_gpu(step) for step in steps]
    return answer


def measure_memory(case: Case) -> dict[str, Any]:
    """Resident bytes that one step takes on top of what the process holds between steps."""
    step = build(case)
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    resting = _status_bytes("VmRSS")
    step()
    return {"peak_bytes": _status_bytes("VmHWM") - resting}


def _peak_on_gpu(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - resting


def _finish(setup: Setup) -> None:
    if setup.device != "cpu":
        torch.cuda.synchronize()


def _matmul_rate(setup: Setup) -> float:
    """Floating point operations a second of the largest product of a ViT-B layer at 8 frames, the best of 10."""
    place = {"device": setup.device, "dtype": setup.torch_dtype}
    num_tokens = setup.num_clips * 1569
    left, right = torch.randn(num_tokens, 768, **place), torch.randn(768, 3072, **place)
    best = min(_seconds(left, right, setup) for _ in range(10))
    return 2 * num_tokens * 768 * 3072 / best


def _seconds(left: torch.Tensor, right: torch.Tensor, setup: Setup) -> float:
    _finish(setup)
    start = time.perf_counter()
    torch.mm(left, right)
    _finish(setup)
    return time.perf_counter() - start


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory can be measured on Linux only")


def main() -> None:
    """Answers the request in the first argument."""
    request = json.loads(sys.argv[1])
    cases = [Case(*case) for case in request["cases"]]
    torch.set_num_threads(request["num_threads"])
    setup = Setup(*request["setup"])
    if request["measure"] == "times":
        answer = measure_times(cases, request["num_samples"], setup)
    else:
        answer = measure_memory(cases[0])
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
