"""Runs the rehearsal of a step in processes of its own, under an enforced limit, and says what it took.

`probe` starts one process per rank, each of which runs this module. On the CPU device memory is what the accounting
allocator counts; what is offloaded stands for host memory and is counted apart.
"""

import json
import os
import subprocess
import sys
import tempfile
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


class ProbeResult(NamedTuple):
    """Of the rank that took most. Bytes are None where memory did not suffice, which `shortage` then tells."""

    backward_bytes: int | None
    update_bytes: int | None
    host_bytes: int | None
    resident_bytes: int | None
    step_s: float | None
    losses: tuple[float, ...]
    shortage: str | None

    @property
    def peak_bytes(self) -> int | None:
        if self.backward_bytes is None or self.update_bytes is None:
            return None
        return max(self.backward_bytes, self.update_bytes)


def probe(request: ProbeRequest) -> ProbeResult:
    """Rehearses and updates `num_steps` times. Raises ProbeError when it fails for another reason than memory."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start(request, rank, Path(folder)) for rank in range(request.world_size)]
        try:
            results = _collect(ranks, Path(folder))
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    shortages = [result.shortage for result in results if result.shortage]
    if shortages:
        return ProbeResult(None, None, None, None, None, (), shortages[0])
    most = (max(values) for values in zip(*(result[:5] for result in results), strict=True))
    return ProbeResult(*most, results[0].losses, None)


def _start(request: ProbeRequest, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(request.world_size),
        "LOCAL_WORLD_SIZE": str(request.world_size),
        "OMP_NUM_THREADS": str(request.num_threads),
    }
    command = [sys.executable, "-m", "jobs.memory_probe", request.model_dump_json(), str(folder)]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=Path(__file__).resolve().parent.parent
        )


def _collect(ranks: list[subprocess.Popen[bytes]], folder: Path) -> list[ProbeResult]:
    """The ranks' results; of one rank alone as soon as memory did not suffice for it, since others may wait for it."""
    until_s = time.monotonic() + _TIMEOUT_S
    while True:
        codes = [process.poll() for process in ranks]
        found = [_result(folder, rank) for rank in range(len(ranks))]
        short = [result for result in found if result is not None and result.shortage]
        if short:
            return short
        if all(code == 0 for code in codes):
            return [result for result in found if result is not None]
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


def _result(folder: Path, rank: int) -> ProbeResult | None:
    path = folder / f"{rank}.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    return ProbeResult(*values[:5], tuple(values[5]), values[6])


def _run(request: ProbeRequest, folder: Path) -> ProbeResult:
    import torch
    import torch.distributed as dist

    from infra.memory_budget import device_budget, is_out_of_memory
    from infra.runtime import prepare_worker

    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if request.use_gpu else torch.device("cpu")
    prepare_worker(request.num_threads)
    if request.use_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if request.use_gpu else "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=request.world_size,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    before = device_budget(device, None).live_bytes()
    limit = None if request.limit_bytes is None else before + request.limit_bytes
    budget = device_budget(device, limit)
    try:
        return _steps(request, device, budget, before)
    except Exception as error:
        if not is_out_of_memory(error) and type(error).__name__ != "MemoryShortageError":
            raise
        return ProbeResult(None, None, None, None, None, (), str(error).splitlines()[0])


def _steps(request: ProbeRequest, device: Any, budget: Any, before: int) -> ProbeResult:
    from infra.engine import build_engine
    from jobs.ranks import ProcessGroupRanks
    from jobs.rehearsal import RehearsalWork, rehearsal_batch
    from model.optim import parameter_groups
    from model.step_key import StepKey
    from model.video_text_model import VideoTextModel

    ranks = ProcessGroupRanks(device)
    engine = build_engine(
        model := VideoTextModel(request.model),
        parameter_groups(model, request.engine.weight_decay),
        request.engine,
        request.clips_per_rank,
        device,
    )
    engine.module.train()
    batch = rehearsal_batch(
        request.model,
        request.clips_per_rank,
        request.micro_batch_size,
        request.text_length,
        request.num_tags,
        ranks.rank,
    )
    resident = backward = update = 0
    losses: list[float] = []
    began_s = time.perf_counter()
    for step in range(request.num_steps):
        for tensor in engine.offloaded():
            budget.move_to_host(tensor)
        began_s = time.perf_counter()
        resident = budget.live_bytes() - before
        budget.reset_peak()
        with engine.accumulate():
            work = RehearsalWork(engine, batch, StepKey(0, step), ranks, request.micro_batch_size)
            losses.append(float(work.run()[0]))
        backward = budget.peak_bytes() - before
        budget.reset_peak()
        if request.engine.offload_optimizer != "none":
            with budget.on_host():  # the update runs there
                engine.step(1e-5)
        else:
            engine.step(1e-5)
        update = budget.peak_bytes() - before
    step_s = time.perf_counter() - began_s
    return ProbeResult(backward, update, budget.host_peak_bytes(), resident, step_s, tuple(losses), None)


if __name__ == "__main__":
    target = Path(sys.argv[2])
    outcome = _run(ProbeRequest.model_validate_json(sys.argv[1]), target)
    part = target / f"{os.environ['RANK']}.part"
    part.write_text(json.dumps(outcome))
    part.rename(target / f"{os.environ['RANK']}.json")
