"""The measuring processes of `svitt bench train`: `ask` starts one for each rank and returns their answers.

Processes of their own, because a counting allocator cannot be put back and ranks need a process each. Requests and
answers are JSON.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from infra.checkpoint import CheckpointStore
from infra.config import EngineConfig
from infra.engine import build_engine
from infra.memory_budget import Budget, device_budget
from infra.runtime import environment, prepare_process, prepare_worker
from jobs.bench_record import BenchError
from jobs.pretrain import (
    build_context,
    build_loader,
    build_or_restore,
    micro_batch_size_of,
    open_store,
    pace_of,
)
from jobs.ranks import ProcessGroupRanks, Ranks, SingleRank
from jobs.train_step import TrainStep
from model.config import ModelConfig
from model.optim import parameter_groups
from model.step_key import derive_seed
from model.video_text_model import VideoTextModel
from pipeline.loader import Batch

CPU = torch.device("cpu")
_TEXT_LENGTH = 32
_LEARNING_RATE = 1e-5
UpdateOn = Callable[[], contextlib.AbstractContextManager[None]]
# Different batches of the bare loop; it shows them in turn.
_BARE_BATCHES = 8
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class TimeLimitError(BenchError):
    """A case that did not end within its time."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step computes: a named model and the clips of one rank. Where it is one of several, all have as many."""

    size: str
    num_frames: int
    num_clips: int
    micro_batch_size: int

    def model_config(self) -> ModelConfig:
        return ModelConfig.named(self.size).replaced(video={"num_frames": self.num_frames})


@dataclass(frozen=True)
class Measuring:
    """The running ranks of a measurement."""

    title: str
    folder: Path
    ranks: "tuple[subprocess.Popen[bytes], ...]"

    def check(self) -> bool:
        """Whether any still runs. Raises BenchError with the last words of one that failed."""
        for number, rank in enumerate(self.ranks):
            if rank.poll():
                words = (self.folder / f"rank-{number}.log").read_text(errors="replace")[-2000:]
                raise BenchError(
                    f"measuring {self.title}: rank {number} ended with {rank.returncode} (-9: out of memory):\n{words}"
                )
        return any(rank.poll() is None for rank in self.ranks)

    def answers(self) -> list[Any]:
        """Of all ranks, once none runs."""
        return [
            json.loads((self.folder / f"rank-{number}.json").read_text()) for number in range(len(self.ranks))
        ]


@contextlib.contextmanager
def start(
    measure: str, arguments: dict[str, Any], num_ranks: int, threads_per_rank: int
) -> Iterator[Measuring]:
    """Starts the ranks of a measurement; they end with the block."""
    with tempfile.TemporaryDirectory(prefix="svitt-bench-") as name, contextlib.ExitStack() as stack:
        request = {"measure": measure, "arguments": arguments, "folder": name, "threads": threads_per_rank}
        ranks = tuple(stack.enter_context(_rank(request, rank, num_ranks)) for rank in range(num_ranks))
        yield Measuring(f"{measure} {arguments}", Path(name), ranks)


def ask(
    measure: str, arguments: dict[str, Any], num_ranks: int, threads_per_rank: int, limit_s: float
) -> list[Any]:
    """Answers of all ranks. Raises TimeLimitError, and BenchError with a failed rank's last words."""
    with start(measure, arguments, num_ranks, threads_per_rank) as measuring:
        deadline_s = time.monotonic() + limit_s
        while measuring.check():
            if time.monotonic() > deadline_s:
                raise TimeLimitError(f"measuring {measuring.title} took longer than {limit_s:.0f} s")
            time.sleep(0.05)
        return measuring.answers()


@contextlib.contextmanager
def _rank(request: dict[str, Any], rank: int, num_ranks: int) -> Iterator["subprocess.Popen[bytes]"]:
    """One measuring process, ended with the block."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    place |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    with (
        environment({**place, "OMP_NUM_THREADS": str(request["threads"])}),
        (Path(request["folder"]) / f"rank-{rank}.log").open("wb") as log,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps({**request, "rank": rank, "num_ranks": num_ranks})],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).resolve().parent.parent,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def random_batch(config: ModelConfig, num_clips: int, first_row: int = 0) -> Batch:
    """Noise and words of full length; clips of 64 actions. Pixels lie where a loader's would: not on the device."""
    random = np.random.default_rng(first_row)
    video, text = config.video, config.text
    shape = (num_clips, video.num_frames, 3, video.image_size, video.image_size)
    length = min(_TEXT_LENGTH, text.max_length)
    ids = torch.tensor(random.integers(text.vocab_size // 2, text.vocab_size, (num_clips, length)))
    ids[:, 0] = text.cls_id
    rows = torch.arange(num_clips) + first_row
    actions = torch.nn.functional.one_hot(rows % 64, 64).bool()
    return Batch(
        video_BTCHW=torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8)),
        text_ids_BL=ids,
        text_mask_BL=torch.ones(num_clips, length, dtype=torch.bool),
        verbs_BV=actions,
        nouns_BU=actions,
        clip_ids=tuple(map(str, rows.tolist())),
        index_B=rows,
    )


def measure_batch(rank: int, num_ranks: int, shape: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Peak device bytes and seconds of steps over a whole batch, by one rank and the plain engine."""
    budget = device_budget(CPU, None)
    case = Shape(**shape)
    step = _step(case, EngineConfig(backend="plain"), SingleRank())
    config = case.model_config()
    # Two micro-batches bring the moments of AdamW and whatever else stays.
    step(0, random_batch(config, min(case.num_clips, 2 * case.micro_batch_size)))
    return _measured(step, case, random_batch(config, case.num_clips), num_steps, budget)


def measure_passes(
    rank: int, num_ranks: int, shape: dict[str, Any], micro_batch_sizes: Sequence[int], rounds: int
) -> list[list[tuple[float, float]]]:
    """Wall and process CPU seconds of steps over one batch in each micro-batch size, taken in turn."""
    case = Shape(**shape)
    step = _step(case, EngineConfig(backend="plain"), SingleRank())
    batch = random_batch(case.model_config(), case.num_clips)
    samples: list[list[tuple[float, float]]] = [[] for _ in micro_batch_sizes]
    for number in range(rounds + 1):
        for size, taken in zip(micro_batch_sizes, samples, strict=True):
            step.micro_batch_size = size
            wall, cpu = time.perf_counter(), time.process_time()
            step(number, batch)
            if number:  # the first warms up
                taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return samples


def measure_engine(
    rank: int, num_ranks: int, shape: dict[str, Any], engine: dict[str, Any], num_steps: int
) -> dict[str, Any]:
    """Seconds of steps, peak bytes of device and host on this rank. What is offloaded is booked to the host."""
    budget = device_budget(CPU, None)
    case = Shape(**shape)
    config = EngineConfig(**engine)
    step = _step(case, config, ProcessGroupRanks(CPU))
    update_on = budget.on_host if config.offload_optimizer != "none" else contextlib.nullcontext
    batch = random_batch(case.model_config(), case.num_clips, rank * case.num_clips)
    # Some buffers come with the first step, and DeepSpeed traces ZeRO 3's order of parameters in it.
    _whole_step(step, 0, batch, update_on)
    for tensor in step.engine.offloaded():
        budget.move_to_host(tensor)
    _whole_step(step, 1, batch, update_on)
    return _measured(step, case, batch, num_steps, budget, update_on)


def run_loop(rank: int, num_ranks: int, run_dir: str, steps_dir: str, is_reading: bool) -> None:
    """Steps of a stage without anything around them, until ended; their times go to a file: see `step_times`.

    Model, engine, step and batches are as the stage has them, from its run directory; unless `is_reading`, the first
    batches are read beforehand and shown in turn.
    """
    place = {"rank": rank, "local_rank": rank, "use_gpu": False}
    context = build_context({"run_dir": run_dir, "stage": 1, "attempt": 0, **place})
    engine, _ = build_or_restore(context, CheckpointStore(context.run.checkpoints(1), rank=rank))
    with open_store(context.recipe, "train") as store:
        pace = pace_of(context, len(store))
        seed = derive_seed(context.recipe.seed, "step", 1)
        step = TrainStep(engine, seed, context.ranks, pace.learning_rate_at, micro_batch_size_of(context))
        reader = build_loader(context, store).batches_from(0)
        batches = (batch for _, batch in reader if isinstance(batch, Batch))
        if not is_reading:
            batches = cycle(list(islice(batches, _BARE_BATCHES)))
            reader.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator, which ends its thread
        with (Path(steps_dir) / f"rank-{rank}.steps").open("w", buffering=1) as file:
            for number, batch in enumerate(batches):
                step(number, batch)
                file.write(f"{time.time()} {time.process_time()}\n")


def step_times(steps_dir: Path, num_ranks: int) -> list[list[tuple[float, float]]]:
    """When each step of a loop ended, in seconds since 1970, and the processor seconds of its process until then, rank
    by rank; none yet of a rank that has not begun.
    """
    ranks = []
    for rank in range(num_ranks):
        file = steps_dir / f"rank-{rank}.steps"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        whole = [line.split() for line in lines if line.endswith("\n")]
        ranks.append([(float(time_s), float(cpu_s)) for time_s, cpu_s in whole])
    return ranks


def _step(case: Shape, config: EngineConfig, ranks: Ranks) -> TrainStep:
    torch.manual_seed(0)
    model = VideoTextModel(case.model_config())
    engine = build_engine(
        model, parameter_groups(model, config.weight_decay), config, case.micro_batch_size, CPU
    )
    engine.module.train()
    return TrainStep(engine, 0, ranks, lambda _: _LEARNING_RATE, case.micro_batch_size)


def _whole_step(step: TrainStep, number: int, batch: Batch, update_on: UpdateOn) -> None:
    """As calling the step does, with its update's temporaries booked to where the optimizer lies."""
    step.gradient(number, batch)
    with update_on():
        step.engine.step(_LEARNING_RATE)


def _measured(
    step: TrainStep,
    case: Shape,
    batch: Batch,
    num_steps: int,
    budget: Budget,
    update_on: UpdateOn = contextlib.nullcontext,
) -> dict[str, Any]:
    budget.reset_peak()
    resident, seconds = budget.live_bytes(), []
    for number in range(num_steps):
        step.ranks.barrier()
        began_s = time.perf_counter()
        _whole_step(step, 2 + number, batch, update_on)
        step.ranks.barrier()
        seconds.append(time.perf_counter() - began_s)
    if step.micro_batch_size != case.micro_batch_size:
        raise BenchError(
            f"memory did not suffice for {case}: the step fell back to micro-batches of {step.micro_batch_size}; "
            "choose a smaller --micro-batch"
        )
    return {
        "step_s": seconds,
        "resident_bytes": resident,
        "peak_device_bytes": budget.peak_bytes(),
        "peak_host_bytes": budget.host_peak_bytes() or 0,
    }


_MEASURES = {
    "batch": measure_batch,
    "passes": measure_passes,
    "engine": measure_engine,
    "loop": run_loop,
}


def main() -> None:
    """Answers the request in the first argument, into a file of its folder."""
    request = json.loads(sys.argv[1])
    rank, num_ranks, folder = request["rank"], request["num_ranks"], Path(request["folder"])
    prepare_process()
    # As the worker of a training stage.
    prepare_worker(request["threads"])
    is_distributed = request["measure"] in ("engine", "loop")
    if is_distributed:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            timeout=_COLLECTIVE_TIMEOUT,
            world_size=num_ranks,
            rank=rank,
        )
    answer = _MEASURES[request["measure"]](rank, num_ranks, **request["arguments"])
    (folder / f"rank-{rank}.json").write_text(json.dumps(answer))
    if is_distributed:
        dist.destroy_process_group()


def arguments_of(shape: Shape, **others: Any) -> dict[str, Any]:
    """A request's arguments as JSON takes them."""
    return {"shape": asdict(shape), **others}


if __name__ == "__main__":
    main()
