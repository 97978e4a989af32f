"""Runs the rehearsal of a step in processes of its own, under an enforced limit, and says what it took.

`probe` starts one process per rank, each of which runs this module. On the CPU device memory is what the accounting
allocator counts; what is offloaded stands for host memory and is counted apart.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from infra.config import EngineConfig, Settings
from model.config import ModelConfig

_TIMEOUT_S = 1800
_POLL_S = 0.05


class ProbeError(RuntimeError):
    """Processes that ended for another reason than memory; the message carries their last words."""


class ProbeRequest(Settings):
    """One rank's share of a step, as the planner sees it."""

    model: ModelConfig
    engine: EngineConfig
    world_size: int = Field(ge=1)
    clips_per_rank: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    text_length: int = Field(ge=2)
    num_tags: tuple[int, int]
    use_gpu: bool = False
    num_threads: int = Field(default=1, ge=1)
    limit_bytes: int | None = None
    num_steps: int = Field(default=2, ge=2, description="The first one makes the optimizer's states.")


class ShortageError(ProbeError):
    """Memory did not suffice; the message says where."""


class ProbeResult(NamedTuple):
    """Of the rank that took most; after the first step, which makes the optimizer's states."""

    resident_bytes: int  # between two steps
    backward_bytes: int
    update_bytes: int
    host_bytes: int  # all that is offloaded; 0 on a GPU's host, where it is not counted
    step_s: float
    loss: float

    @property
    def peak_bytes(self) -> int:
        """The most that was on the device at once."""
        return max(self.backward_bytes, self.update_bytes)


def probe(request: ProbeRequest) -> ProbeResult:
    """Rehearses and updates `num_steps` times. Raises ShortageError where memory does not suffice, ProbeError when a
    rank fails for another reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start(request, rank, Path(folder)) for rank in range(request.world_size)]
        try:
            results = _collect(ranks, Path(folder))
        finally:
            for process in ranks:
                process.kill()
                process.communicate()  # waits, and closes its input
    return ProbeResult(*(max(values) for values in zip(*results, strict=True)))


def _start(request: ProbeRequest, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(request.world_size),
        "LOCAL_WORLD_SIZE": str(request.world_size),
        "OMP_NUM_THREADS": str(request.num_threads),
        "OMP_WAIT_POLICY": "passive",  # threads that wait actively take the cores of the other ranks
    }
    command = [sys.executable, "-m", "jobs.memory_probe", request.model_dump_json(), str(folder)]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closed by the kernel when this process ends, however it does
            stdout=log,
            stderr=log,
            env=environment,
            cwd=Path(__file__).resolve().parent.parent,
        )


def _collect(ranks: list[subprocess.Popen[bytes]], folder: Path) -> list[ProbeResult]:
    until_s = time.monotonic() + _TIMEOUT_S
    while True:
        codes = [process.poll() for process in ranks]
        # One rank alone may lack memory, and the others then wait for it.
        for rank in range(len(ranks)):
            if (folder / f"{rank}.shortage").is_file():
                raise ShortageError((folder / f"{rank}.shortage").read_text())
        if all(code == 0 for code in codes):
            return [
                ProbeResult(*json.loads((folder / f"{rank}.json").read_text())) for rank in range(len(ranks))
            ]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None or time.monotonic() > until_s:
            words = (folder / f"{failed or 0}.log").read_text(errors="replace")[-2000:]
            what = (
                f"ended with {codes[failed]}" if failed is not None else f"did not end within {_TIMEOUT_S} s"
            )
            raise ProbeError(
                f"rehearsing a step: rank {failed or 0} {what} (-9: host memory ran out):\n{words}"
            )
        time.sleep(_POLL_S)


def _run(request: ProbeRequest, folder: Path) -> ProbeResult:
    import torch
    import torch.distributed as dist

    from infra.memory_budget import is_out_of_memory
    from infra.runtime import compute_repeatably, prepare_worker
    from jobs.batch_work import MemoryShortageError

    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if request.use_gpu else torch.device("cpu")
    prepare_worker(request.num_threads)
    if request.use_gpu:
        torch.cuda.set_device(device)
        compute_repeatably()
    dist.init_process_group(
        "nccl" if request.use_gpu else "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=request.world_size,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    try:
        return _steps(request, device)
    except Exception as error:
        if not is_out_of_memory(error) and not isinstance(error, MemoryShortageError):
            raise
        raise ShortageError(str(error).splitlines()[0]) from error


def _steps(request: ProbeRequest, device: Any) -> ProbeResult:
    from infra.engine import build_engine
    from infra.memory_budget import device_budget
    from jobs.ranks import ranks_of_group
    from jobs.rehearsal import RehearsalWork, rehearsal_batch
    from model.optim import parameter_groups
    from model.step_key import StepKey
    from model.video_text_model import VideoTextModel

    ranks = ranks_of_group(device)
    budget = device_budget(device, request.limit_bytes if request.use_gpu else None)
    before = budget.live_bytes()
    engine = build_engine(
        model := VideoTextModel(request.model),
        parameter_groups(model, request.engine.weight_decay),
        request.engine,
        request.clips_per_rank,
        device,
    )
    engine.module.train()
    model.offload_within(budget.on_host)
    if request.limit_bytes is not None and not request.use_gpu:
        # On the CPU an engine is built where it is, and what it offloads can be told apart only then. Where gradients
        # go to the host, their buffers there are made in the first backward pass: its limit is that of the next.
        for tensor in engine.offloaded():
            budget.move_to_host(tensor)
        if not request.engine.offloads:
            budget = device_budget(device, before + request.limit_bytes)
    batch = rehearsal_batch(
        request.model,
        request.clips_per_rank,
        request.micro_batch_size,
        request.text_length,
        request.num_tags,
        ranks.rank,
    )
    resident = backward = update = host = 0
    loss = 0.0
    began_s = time.perf_counter()
    for step in range(request.num_steps):
        for tensor in engine.offloaded():
            budget.move_to_host(tensor)
        if step == 1 and request.limit_bytes is not None and not request.use_gpu:
            budget = device_budget(device, before + request.limit_bytes)
        began_s = time.perf_counter()
        resident = budget.live_bytes() - before
        budget.reset_peak()
        with engine.accumulate():
            work = RehearsalWork(engine, batch, StepKey(0, step), ranks, request.micro_batch_size)
            loss = float(work.run()[0])
        backward, host = budget.peak_bytes() - before, budget.host_peak_bytes() or 0
        budget.reset_peak()
        if request.engine.offload_optimizer != "none":
            with budget.on_host():  # the update runs there
                engine.step(1e-5)
        else:
            engine.step(1e-5)
        update = budget.peak_bytes() - before
    step_s = time.perf_counter() - began_s
    host = max(host, budget.host_peak_bytes() or 0)
    return ProbeResult(resident, backward, update, host, step_s, loss)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _main(request: ProbeRequest, folder: Path, rank: int) -> None:
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    try:
        name, text = f"{rank}.json", json.dumps(_run(request, folder))
    except ShortageError as shortage:
        name, text = f"{rank}.shortage", str(shortage)
    part = folder / f"{rank}.part"
    part.write_text(text)
    part.rename(folder / name)


if __name__ == "__main__":
    _main(ProbeRequest.model_validate_json(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"]))
