"""SViTT-Ego of ViT-B size, 16 frames of 224 pixels, 1,024 clips a step, in 8 GiB of device memory.

`python -m tests.soak.eight_gib --clips 16 --keep-rate 0.5` plans it, rehearses the step of 1,024 clips under the limit,
takes a whole step under it, of as many clips as there is time for (1,024 take two cores one to four hours), and finds
the longest clips that would fit, sparse and dense.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from infra.config import EngineConfig
from infra.engine import build_engine
from infra.memory_budget import device_budget
from jobs.batch_work import Batch
from jobs.memory_probe import probe
from jobs.plan import engine_words, probe_request, recompute_words
from jobs.plan_search import Choice, Plan, Planner, Recompute, Settings, Workload, candidates, search
from jobs.ranks import ProcessGroupRanks
from jobs.rehearsal import rehearsal_batch
from jobs.train_step import TrainStep
from model.config import ModelConfig
from model.optim import parameter_groups
from model.video_text_model import VideoTextModel
from tests.infra.two_ranks import run_two

MIB, GIB = 2**20, 2**30
LENGTH, TAGS = 32, (118, 582)
BATCH, LIMIT, HOST = 1024, 8 * GIB, 32 * GIB
ENGINE = EngineConfig(bucket_bytes=4 * MIB)
DENSE = {"num_random_blocks": None, "keep_rate": 1.0}


def work(frames: int, clips: int, keep_rate: float | None) -> Workload:
    """Dense where the keep rate is None."""
    video = {"num_frames": frames, **(DENSE if keep_rate is None else {"keep_rate": keep_rate})}
    return Workload(f"T {frames}", ModelConfig.named("base").replaced(video=video), clips, 1, LENGTH, TAGS)


def varied_batch(load: Workload) -> Batch:
    """Random pixels and words, every clip another action."""
    clips, vocab_size = load.clips_per_rank, load.model.text.vocab_size
    batch = rehearsal_batch(load.model, clips, clips, load.text_length, load.num_tags)
    batch.video_BTCHW.random_(0, 256)
    batch.text_ids_BL[:, 1:].random_(vocab_size // 2, vocab_size)
    for tags in (batch.verbs_BV, batch.nouns_BU):
        tags[torch.arange(clips), torch.arange(clips) % tags.shape[1]] = True
    return batch


def planned(
    load: Workload, engine: EngineConfig, limit_bytes: int, host_bytes: int, planner: Planner
) -> Choice:
    """The plan's answer, printed."""
    settings = list(candidates(engine, load.model, 1, has_kernel=True))
    plan = search([load], settings, limit_bytes, host_bytes, planner)
    assert isinstance(plan, Plan), plan
    (choice,) = plan.choices
    print(
        f"{load.clips_per_rank} clips in 8 GiB: {engine_words(choice.settings)}, recompute "
        f"{recompute_words(choice.settings.recompute)}, {choice.micro_batch_size} at once; {choice.prediction}",
        flush=True,
    )
    return choice


def whole_step(rank: int, argument: tuple[Choice, int, float]) -> None:
    """Random pixels and words, every clip another one; all state of the device inside the limit."""
    choice, clips, keep_rate = argument
    torch.set_num_threads(2)
    device = torch.device("cpu")
    budget = device_budget(device, None)
    before = budget.live_bytes()
    budget = device_budget(device, before + LIMIT)
    load = work(16, clips, keep_rate)
    model = VideoTextModel(choice.settings.recompute.apply(load.model))
    engine = build_engine(model, parameter_groups(model, 0.02), choice.settings.engine, clips, device)
    engine.module.train()
    model.offload_within(budget.on_host)
    batch = varied_batch(load)
    for tensor in engine.offloaded():
        budget.move_to_host(tensor)
    ranks = ProcessGroupRanks(device)
    step = TrainStep(engine, 0, ranks, lambda _: 1e-5, choice.micro_batch_size)
    began_s, cpu_s = time.monotonic(), time.process_time()
    metrics = step(0, batch)
    wall_s = time.monotonic() - began_s
    assert bool(metrics.isfinite().all()), metrics
    print(
        f"whole step of {clips} clips, {step.micro_batch_size} at once: losses {metrics[:4].tolist()}, gradient norm "
        f"{float(metrics[4]):.3f}; {wall_s / clips:.1f} s a clip ({(time.process_time() - cpu_s) / clips:.1f} s of "
        f"CPU); peak {(budget.peak_bytes() - before) / MIB:.0f} of {LIMIT / MIB:.0f} MiB, on the host "
        f"{(budget.host_peak_bytes() or 0) / MIB:.0f} MiB",
        flush=True,
    )


def longest(keep_rate: float | None, planner: Planner) -> int:
    """Frames of the longest clip that fits, in steps of 16, one clip at once and all that saves memory on."""
    engine = EngineConfig(
        zero_stage=3, gradient_reduction="backward", offload_optimizer="cpu", offload_parameters="cpu"
    )
    settings = Settings(engine, Recompute("all", "all", offload=True))

    def fits(sixteens: int) -> bool:
        return planner.predict(work(16 * sixteens, 2, keep_rate), settings, 1).total <= LIMIT

    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 16 * low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--keep-rate", type=float, default=0.7)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--skip-longest", action="store_true")
    options = parser.parse_args()
    planner, load = Planner(), work(16, BATCH, options.keep_rate)
    engine = ENGINE.model_copy(update={"precision": options.precision})
    choice = planned(load, engine, LIMIT, HOST, planner)
    # With fewer clips at once than planned: on a CPU what the offload keeps on the host counts in part.
    small = replace(choice, micro_batch_size=options.micro)
    predicted = planner.predict(load, choice.settings, options.micro)
    found = probe(probe_request(load, small, False, LIMIT).model_copy(update={"num_threads": 2}))
    print(
        f"{BATCH} clips rehearsed under the limit, {options.micro} at once: peak {found.peak_bytes / MIB:.0f} MiB, "
        f"predicted {predicted.total / MIB:.0f}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        run_two(whole_step, (small, options.clips, options.keep_rate), Path(folder), 1)
    if not options.skip_longest:
        for keep_rate in (options.keep_rate, None):
            frames = longest(keep_rate, planner)
            gmacs = work(frames, 1, keep_rate).model.video.macs() / 1e9
            print(
                f"{'dense' if keep_rate is None else 'sparse'}: {frames} frames fit, {gmacs:.0f} GMACs a clip",
                flush=True,
            )


if __name__ == "__main__":
    main()
