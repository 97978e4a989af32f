"""One batch computed in many ways; a module of its own so that started processes can import it.

`python -m tests.jobs.gradient_cases --batch 256` runs them all on 1 and 2 ranks and prints the errors.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infra.config import EngineConfig
from infra.engine import Engine, build_engine
from jobs.batch_work import normalise
from jobs.ranks import ProcessGroupRanks, SingleRank
from jobs.train_step import TrainStep
from model.config import ModelConfig
from model.losses import ActionTags
from model.objective import Captions, training_losses
from model.optim import parameter_groups
from model.step_key import StepKey
from model.video_text_model import VideoTextModel
from pipeline.loader import Batch
from tests.infra.two_ranks import run_two

CPU = torch.device("cpu")
SEED, STEP = 3, 2
PLAIN = EngineConfig(backend="plain")
ENGINES = {
    "plain": PLAIN,
    **{f"ZeRO {stage}": EngineConfig(zero_stage=stage) for stage in (0, 1, 2, 3)},
    "ZeRO 2 reducing in backward": EngineConfig(zero_stage=2, gradient_reduction="backward"),
    "ZeRO 3 reducing in backward": EngineConfig(zero_stage=3, gradient_reduction="backward"),
    **{f"ZeRO {s} offload": EngineConfig(zero_stage=s, offload_optimizer="cpu") for s in (1, 2, 3)},
    "ZeRO 3 offload all": EngineConfig(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu"),
}
# The others are told apart by `main` alone: each takes seconds to build.
IN_TESTS = (
    "plain",
    "ZeRO 1",
    "ZeRO 2",
    "ZeRO 3",
    "ZeRO 2 reducing in backward",
    "ZeRO 2 offload",
    "ZeRO 3 offload all",
)


@dataclass(frozen=True)
class Errors:
    """Of a step against the whole batch in one graph."""

    loss: float  # relative, the largest of total, vtc, vtm, mlm
    gradient: float  # norm of the difference over the norm, all parameters as one vector
    parameter: float  # the same of the worst parameter; parameters of no gradient left out


def model(is_recomputing: bool = False) -> VideoTextModel:
    """Random edges, pruning in both places, dropout and drop path are on, the temperature is learned."""
    torch.manual_seed(0)
    offload = {"offload_activations": is_recomputing}
    config = ModelConfig.named("tiny").replaced(
        video={
            "num_frames": 4,
            "drop_path": 0.2,
            "image_size": 48,
            "patch_size": 12,
            "block_size": 8,
            "recompute": "all_but_attention" if is_recomputing else "none",
            **offload,
        },
        text={"dropout": 0.1, "recompute": "all" if is_recomputing else "none", **offload},
        multimodal_keep_rate=0.7,
        multimodal_prune_layers=(ModelConfig.named("tiny").text.fusion_layer,),
        learn_temperature=True,
    )
    return VideoTextModel(config).train()


def batch(num_clips: int) -> Batch:
    """Random pixels and words; a few clips share their action, one pair of rows is the same clip."""
    generator = torch.Generator().manual_seed(num_clips)
    pixels = torch.randint(0, 256, (num_clips, 4, 3, 48, 48), generator=generator, dtype=torch.uint8)
    ids = torch.randint(5, 256, (num_clips, 8), generator=generator)
    ids[:, 0] = 2
    mask = torch.arange(8) < torch.randint(3, 9, (num_clips, 1), generator=generator)
    tags = torch.nn.functional.one_hot(torch.arange(num_clips) % (num_clips - 3)).bool()
    rows = torch.arange(num_clips) * 7
    rows[-1] = rows[0]
    return Batch(pixels, ids.where(mask, 0), mask, tags, tags, tuple(map(str, rows.tolist())), rows)


def part(whole: Batch, rank: int, world_size: int) -> Batch:
    """What one rank holds of it."""
    size = len(whole.index_B) // world_size
    rows = slice(rank * size, (rank + 1) * size)
    return Batch(
        whole.video_BTCHW[rows],
        whole.text_ids_BL[rows],
        whole.text_mask_BL[rows],
        whole.verbs_BV[rows],
        whole.nouns_BU[rows],
        whole.clip_ids[rows],
        whole.index_B[rows],
    )


def reference(whole: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of the objective itself."""
    tags = ActionTags(whole.verbs_BV, whole.nouns_BU, whole.index_B)
    captions = Captions(whole.text_ids_BL, whole.text_mask_BL, whole.index_B)
    net = model()
    video = normalise(whole.video_BTCHW, CPU, torch.float32)
    terms = training_losses(net, video, captions, tags, StepKey(SEED, STEP))
    terms.total.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return torch.stack(terms[:4]).detach(), gradients


def engine_of(config: EngineConfig, is_recomputing: bool = False) -> Engine:
    net = model(is_recomputing)
    engine = build_engine(net, parameter_groups(net, config.weight_decay), config, 1, CPU)
    engine.module.train()
    return engine


def errors(
    engine: Engine,
    whole: Batch,
    micro_batch_size: int | None,
    rank: int,
    world_size: int,
    expected: tuple[Tensor, dict[str, Tensor]],
) -> Errors:
    """One step of this rank against `expected`; its rate is 0, so the weights stay."""
    ranks = ProcessGroupRanks(CPU) if world_size > 1 else SingleRank()
    step = TrainStep(engine, SEED, ranks, lambda _: 1e-4, micro_batch_size)
    losses = step.gradient(STEP, part(whole, rank, world_size))
    if world_size > 1:
        torch.distributed.all_reduce(losses)
        losses /= world_size
    found = engine.gradients()
    engine.step(lr=0.0)
    total = torch.stack([g.norm() for g in expected[1].values()]).norm()
    # The bias of keys shifts all scores of a query alike: its true gradient is zero.
    misses = {name: (found[name] - gradient).norm() for name, gradient in expected[1].items()}
    worst = max(
        float(miss / expected[1][name].norm())
        for name, miss in misses.items()
        if not name.endswith("key.bias")
    )
    return Errors(
        loss=float(((losses - expected[0]) / expected[0]).abs().max()),
        gradient=float(torch.stack(list(misses.values())).norm() / total),
        parameter=worst,
    )


def compare_on_two_ranks(rank: int, num_clips: int) -> None:
    """Engines that differ in how gradients travel, rows in one piece and in uneven pieces."""
    whole = batch(num_clips)
    expected = reference(whole)
    # ZeRO 3 gathers parameters around every run of a layer, also the second.
    for name, is_recomputing in (*((name, False) for name in IN_TESTS), ("ZeRO 3", True)):
        engine = engine_of(ENGINES[name], is_recomputing)
        for micro_batch_size in (None, 3):
            result = errors(engine, whole, micro_batch_size, rank, 2, expected)
            what = f"{name}, micro-batch {micro_batch_size}, recomputing {is_recomputing}: {result}"
            assert result.loss < 1e-6, what
            assert result.gradient < 1e-5, what
            assert result.parameter < 1e-4, what


def print_all(rank: int, setting: tuple[int, int]) -> None:
    num_clips, world_size = setting
    whole = batch(num_clips)
    expected = reference(whole)
    for name, config in ENGINES.items():
        engine = engine_of(config)
        for size in (num_clips // world_size, num_clips // 4 // world_size, 8):
            result = errors(engine, whole, size, rank, world_size, expected)
            if rank == 0:
                row = f"{name:28} {world_size} rank(s), micro-batch {size:3}"
                print(
                    f"{row}: loss {result.loss:.1e} gradient {result.gradient:.1e} parameter {result.parameter:.1e}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of a step against the whole batch in one graph.")
    parser.add_argument("--batch", type=int, default=256)
    num_clips = parser.parse_args().batch
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, 2):
            run_two(print_all, (num_clips, world_size), Path(folder), world_size)


if __name__ == "__main__":
    main()
