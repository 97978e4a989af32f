"""`svitt plan`: what a recipe takes in a given memory, stage by stage, and the fastest settings that fit."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.table import Table

from infra.config_io import apply_overrides
from jobs.bench_record import print_table
from jobs.memory_plan import Prediction
from jobs.memory_probe import ProbeRequest, ShortageError, probe
from jobs.plan_search import (
    Choice,
    Plan,
    PlanError,
    Planner,
    Recompute,
    Settings,
    Wish,
    Workload,
    candidates,
    search,
    step_seconds,
    usable_bytes,
)
from jobs.progress import ProgressReport
from jobs.recipe import Recipe, StageConfig, num_stage_steps
from pipeline.errors import ShardError
from pipeline.manifest import read_manifest
from pipeline.storage import StoragePath, storage_path
from pipeline.text import CaptionTokenizer

MIB, GIB = 2**20, 2**30
# CUDA's context, its modules and NCCL take this of a GPU besides all tensors. It grows with the processor: an H200 of
# 132 multiprocessors took 1.65 GiB; cards of 8 to 24 GB have a fifth to a half of them.
GPU_RESERVE_BYTES = 700 * MIB
# EgoClip's verb and noun classes, where no shards say otherwise.
_EGOCLIP_TAGS = (118, 582)
_EGOCLIP_CLIPS = 3_847_723


@dataclass(frozen=True, slots=True)
class Wanted:
    """The memory of one device, how many devices train, and the memory of the host they share."""

    memory_bytes: int
    num_devices: int
    host_bytes: int | None = None
    verify: bool = False


def run_plan(
    recipe: Recipe, tree: dict[str, Any], wanted: Wanted, write: Path | None, report: ProgressReport
) -> int:
    """Prints the plan; 0 when something fits, 1 when nothing does. `tree` is the recipe as it is written, from which
    `write` gets its copy with the settings found. Raises PlanError.
    """
    _check(recipe, wanted)
    works = [workload(recipe, stage, wanted.num_devices) for stage in recipe.stages]
    own = own_settings(recipe)
    planner = Planner()
    usable = usable_bytes(wanted.memory_bytes) - (GPU_RESERVE_BYTES if recipe.cluster.use_gpu else 0)
    loaders = loader_bytes(recipe, wanted.num_devices) * wanted.num_devices
    host = (wanted.host_bytes or psutil.virtual_memory().total) - loaders
    report.say(
        f"{recipe.name} on {wanted.num_devices} x {_amount(wanted.memory_bytes)}"
        + (
            f", of which {GPU_RESERVE_BYTES / MIB:.0f} MiB go to CUDA itself"
            if recipe.cluster.use_gpu
            else ""
        )
        + f"; host memory {host / GIB:.1f} GiB beside the loaders' batches"
    )

    def as_it_is(work: Workload, stage: StageConfig) -> Choice:
        size = min(stage.micro_batch_size or work.clips_per_rank, work.clips_per_rank)
        return Choice(own, size, planner.predict(work, own, size), step_seconds(work, own, size))

    now = [as_it_is(work, stage) for work, stage in zip(works, recipe.stages, strict=True)]
    print_table(report.console, table("The recipe as it is", works, now, usable))
    tried = list(candidates(recipe.engine, recipe.model, wanted.num_devices, has_kernel(recipe)))
    trace_ahead(planner, works, tried, report)
    found = search(works, tried, usable, host // wanted.num_devices, planner)
    if isinstance(found, Wish):
        report.say(_nothing_fits(found, wanted))
        return 1
    print_table(report.console, table("The fastest settings that fit", works, found.choices, usable))
    if found.wish is not None:
        report.say(_missed(found.wish))
    changes = overrides(recipe, found, wanted.num_devices)
    report.say("svitt submit ... " + " ".join(f"--set {change}" for change in changes))
    if write is not None:
        write.write_text(yaml.safe_dump(apply_overrides(tree, changes), sort_keys=False))
        report.say(f"recipe with these settings: {write}")
    if wanted.verify:
        verify(recipe, works, found, usable, report)
    return 0


def trace_ahead(
    planner: Planner, works: Sequence[Workload], tried: Sequence[Settings], report: ProgressReport
) -> None:
    """The rehearsals of all settings, on all cores, with a line of progress."""
    left = planner.prepare(works, tried, len(os.sched_getaffinity(0)))
    first = next(left, 0)
    with report.task("rehearsing steps without data", first + 1) as task:
        for _ in itertools.chain((first,), left):
            task.advance()


def workload(recipe: Recipe, stage: StageConfig, num_devices: int) -> Workload:
    """What one rank of so many has to do for a stage."""
    num_clips, num_tags = data_size(recipe)
    model = recipe.stage_model(stage)
    if (vocabulary := vocabulary_file(recipe)) is not None:
        vocab_size = CaptionTokenizer(vocabulary, recipe.loader.text_length).vocab_size
        model = model.replaced(text={"vocab_size": vocab_size})
    return Workload(
        name=stage.name,
        model=model,
        clips_per_rank=stage.clips_per_rank(num_devices),
        world_size=num_devices,
        text_length=recipe.loader.text_length,
        num_tags=num_tags,
        num_steps=num_stage_steps(stage, num_clips),
        on_gpu=recipe.cluster.use_gpu,
    )


def own_settings(recipe: Recipe) -> Settings:
    video, text = recipe.model.video, recipe.model.text
    offload = video.offload_activations or text.offload_activations
    return Settings(recipe.engine, Recompute(video.recompute, text.recompute, offload))


def data_size(recipe: Recipe) -> tuple[int, tuple[int, int]]:
    """Training clips, and verb and noun classes; EgoClip's where the shards are not there yet."""
    try:
        manifest = read_manifest(storage_path(recipe.data.shards) / "train")
    except (ShardError, OSError):
        return _EGOCLIP_CLIPS, _EGOCLIP_TAGS
    return manifest.num_clips, (manifest.num_verbs, manifest.num_nouns)


def vocabulary_file(recipe: Recipe) -> StoragePath | str | None:
    """The data's vocabulary; None before there are shards, when the model's own size counts."""
    if recipe.data.vocabulary is not None:
        return recipe.data.vocabulary
    path = storage_path(recipe.data.shards) / "train" / "vocab.txt"
    return path if path.is_file() else None


def loader_bytes(recipe: Recipe, num_devices: int) -> int:
    """Host memory of the uint8 batches that one rank's loader has ready, in the stage that takes most."""
    frame = 3 * recipe.loader.image_size**2
    clips = max(s.clips_per_rank(num_devices) * s.num_frames for s in recipe.stages)
    return (recipe.loader.prefetch_batches + 1) * clips * frame


def has_kernel(recipe: Recipe) -> bool:
    """Whether attention runs as one operation whose result can be kept."""
    video = recipe.model.video
    return not video.official_quirks and video.attention_backend != "reference"


def overrides(recipe: Recipe, plan: Plan, num_devices: int) -> list[str]:
    """`key=value` for all that differs from the recipe."""
    settings = plan.choices[0].settings
    changes = [] if recipe.cluster.num_workers == num_devices else [f"cluster.num_workers={num_devices}"]
    before, after = recipe.engine.model_dump(mode="json"), settings.engine.model_dump(mode="json")
    changes += [f"engine.{key}={_yaml(after[key])}" for key in after if after[key] != before[key]]
    model = settings.recompute.apply(recipe.model)
    for part in ("video", "text"):
        for key in ("recompute", "offload_activations"):
            value = getattr(getattr(model, part), key)
            if value != getattr(getattr(recipe.model, part), key):
                changes.append(f"model.{part}.{key}={_yaml(value)}")
    for number, (stage, choice) in enumerate(zip(recipe.stages, plan.choices, strict=True)):
        whole = stage.clips_per_rank(num_devices)
        if choice.micro_batch_size != (stage.micro_batch_size or whole):
            changes.append(f"stages.{number}.micro_batch_size={choice.micro_batch_size}")
    return changes


def table(title: str, works: Sequence[Workload], choices: Sequence[Choice], usable_bytes: int) -> Table:
    """One row a stage: settings, the parts of the peak, and what is left."""
    shown = Table(title=title, title_justify="left")
    for name in ("stage", "engine", "recompute"):
        shown.add_column(name)
    for name in (
        "clips",
        "at once",
        "param.",
        "optim.",
        "grad.",
        "activ.",
        "logits",
        "work",
        "peak",
        "MiB left",
        "host",
    ):
        shown.add_column(name, justify="right")
    for work, choice in zip(works, choices, strict=True):
        p: Prediction = choice.prediction
        left = usable_bytes - p.total
        shown.add_row(
            work.name,
            engine_words(choice.settings),
            recompute_words(choice.settings.recompute),
            str(work.clips_per_rank),
            str(choice.micro_batch_size),
            *(f"{part / MIB:.0f}" for part in p[1:7]),
            f"{p.total / MIB:.0f} ({p.moment})",
            f"{left / MIB:.0f}" if left >= 0 else f"[red]{left / MIB:.0f}[/red]",
            f"{p.host / MIB:.0f}",
        )
    return shown


def engine_words(settings: Settings) -> str:
    engine = settings.engine
    if engine.backend == "plain":
        return "plain"
    words = f"ZeRO {engine.zero_stage}"
    if engine.gradient_reduction == "backward" and engine.zero_stage > 1:
        words += ", reducing often"
    if engine.offload_optimizer != "none":
        words += f", optimizer on {engine.offload_optimizer}"
    if engine.offload_parameters != "none":
        words += f", parameters on {engine.offload_parameters}"
    return words


def recompute_words(recompute: Recompute) -> str:
    if recompute == Recompute():
        return "none"
    words = f"video {recompute.video}, text {recompute.text}".replace("_", " ")
    return words + (", kept on the host" if recompute.offload else "")


def verify(
    recipe: Recipe, works: Sequence[Workload], plan: Plan, usable_bytes: int, report: ProgressReport
) -> None:
    """Rehearses each stage's step under the limit, and says what it took. Raises PlanError where it does not fit."""
    for work, choice in zip(works, plan.choices, strict=True):
        try:
            result = probe(probe_request(work, choice, recipe.cluster.use_gpu, usable_bytes))
        except ShortageError as shortage:
            raise PlanError(
                f"stage {work.name} was predicted to take {choice.prediction.total / MIB:.0f} MiB, but ran out of "
                f"{usable_bytes / MIB:.0f} MiB: {shortage}"
            ) from shortage
        error = choice.prediction.total / result.peak_bytes - 1
        report.say(
            f"stage {work.name}: rehearsed within the limit; peak {result.peak_bytes / MIB:.0f} MiB, predicted "
            f"{choice.prediction.total / MIB:.0f} ({error:+.1%})"
        )


def probe_request(work: Workload, choice: Choice, use_gpu: bool, limit_bytes: int | None) -> ProbeRequest:
    return ProbeRequest(
        model=choice.settings.recompute.apply(work.model),
        engine=choice.settings.engine,
        world_size=work.world_size,
        clips_per_rank=work.clips_per_rank,
        micro_batch_size=choice.micro_batch_size,
        text_length=work.text_length,
        num_tags=work.num_tags,
        use_gpu=use_gpu,
        limit_bytes=limit_bytes,
    )


def _check(recipe: Recipe, wanted: Wanted) -> None:
    if not recipe.stages:
        raise PlanError(f"recipe {recipe.name} has no stages; there is nothing to plan")
    if wanted.num_devices < 1:
        raise PlanError(f"--devices is {wanted.num_devices}; at least one device trains")
    for stage in recipe.stages:
        if stage.global_batch_size % wanted.num_devices:
            raise PlanError(
                f"stage {stage.name}: global_batch_size {stage.global_batch_size} does not divide by "
                f"{wanted.num_devices} devices; change one of them"
            )


def _nothing_fits(wish: Wish, wanted: Wanted) -> str:
    return (
        f"Nothing fits: with {engine_words(wish.settings)}, recompute {recompute_words(wish.settings.recompute)}, "
        f"stage {wish.stage} misses {wish.missing_bytes / MIB:.0f} MiB at one clip at a time. Give it "
        f"{_amount(wanted.memory_bytes + wish.missing_bytes)} or more devices; or take fewer frames, a lower "
        "keep_rate, a smaller model, or engine.precision: bf16."
    )


def _missed(wish: Wish) -> str:
    return (
        f"Nearest that does not fit: stage {wish.stage} with {wish.micro_batch_size} clips at once, "
        f"{engine_words(wish.settings)}, recompute {recompute_words(wish.settings.recompute)}, misses "
        f"{wish.missing_bytes / MIB:.1f} MiB"
    )


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


def _yaml(value: object) -> str:
    return yaml.safe_dump(value).removesuffix("\n...\n").strip()
