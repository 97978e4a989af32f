"""One stage on one rank: the first page to read. What `train_worker` does is what a stage is.

Runs inside a worker process that Ray Train placed and joined with the others by torch.distributed.
"""

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from infra.checkpoint import Checkpoint, CheckpointStore, open_checkpoint
from infra.config_io import config_hash
from infra.engine import Engine, build_engine, torch_dtype
from infra.engine_memory import moment_bytes
from infra.journal import Journal, NullTracker, Tracker
from infra.ledger import Ledger
from infra.memory_budget import Budget
from infra.runtime import peak_rss_bytes
from jobs.damaged_steps import DamagedSteps
from jobs.evaluate import Encoder, Evaluation, score_egomcq
from jobs.memory_plan import Prediction, engine_memory, predict
from jobs.memory_watch import MemoryWatch, batches_that_fit, open_budget
from jobs.ranks import ProcessGroupRanks, Ranks
from jobs.recipe import Recipe, StageConfig, num_stage_steps
from jobs.rehearsal import rehearsal_batch
from jobs.run_dir import RunDir
from jobs.step_memory import trace_step
from jobs.train_loop import Hooks, Interval, Pace, fit
from jobs.train_step import TrainStep
from model.config import ModelConfig
from model.optim import lr_factor, parameter_groups
from model.step_key import derive_seed
from model.video_text_model import VideoTextModel
from model.weights import load_for_num_frames
from pipeline.config import LoaderConfig
from pipeline.loader import Batch, BatchLoader
from pipeline.questions import read_questions
from pipeline.storage import storage_path
from pipeline.store import ClipStore
from pipeline.text import CaptionTokenizer

logger = logging.getLogger(__name__)

GIB = 2**30


class StageError(RuntimeError):
    """A stage that cannot start; the message says what it needs."""


@dataclass(frozen=True)
class StageContext:
    """What every part of a stage's work on one rank looks at."""

    run: RunDir
    recipe: Recipe
    number: int
    device: torch.device
    ranks: Ranks
    tokenizer: CaptionTokenizer
    ledger: Ledger
    budget: Budget | None = None
    bytes_before: int = 0

    @property
    def stage(self) -> StageConfig:
        return self.recipe.stages[self.number - 1]

    @property
    def is_first_rank(self) -> bool:
        return self.ranks.rank == 0

    def model_config(self) -> ModelConfig:
        """The stage's model for the vocabulary of the data."""
        tokenizer = self.tokenizer
        ids = {"pad_id": tokenizer.pad_id, "cls_id": tokenizer.cls_id, "mask_id": tokenizer.mask_id}
        return self.recipe.stage_model(self.stage).replaced(text={"vocab_size": tokenizer.vocab_size, **ids})


def train_worker(config: dict[str, Any]) -> None:
    """Trains one stage to its end or until stopped, then scores it. Safe to run again at any point.

    `config`: run_dir, stage (from 1), attempt, use_gpu; rank, local_rank, world_size are filled in by Ray Train.
    """
    context = build_context(config)
    checkpoints = CheckpointStore(
        context.run.checkpoints(context.number),
        rank=context.ranks.rank,
        world_size=context.ranks.world_size,
        keep_last=context.recipe.checkpoint.keep_last,
    )
    context.ranks.barrier()
    engine, first_step = build_or_restore(context, checkpoints)
    tracker = (
        Journal(context.run.journal(context.number), first_step) if context.is_first_rank else NullTracker()
    )
    tracker.params(stage_params(context))
    try:
        if train(context, engine, first_step, checkpoints, tracker):
            del engine
            evaluate_stage(context, checkpoints, tracker)
    finally:
        tracker.close()


def stage_params(context: StageContext) -> dict[str, Any]:
    """What tells this stage from others, for the tracker: its settings, its ranks, the size of its model."""
    model = context.model_config()
    return {
        **context.stage.model_dump(mode="json", exclude_none=True),
        "seed": context.recipe.seed,
        "world_size": context.ranks.world_size,
        "zero_stage": context.recipe.engine.zero_stage,
        "num_parameters": model.num_parameters(),
        "tokens_in": model.video.tokens_by_layer()[0],
        "tokens_out": model.video.tokens_by_layer()[-1],
    }


def build_context(config: dict[str, Any]) -> StageContext:
    """Prepares the process (device, log file, seed) and opens what all steps share: the only side effects."""
    run = RunDir(Path(config["run_dir"]))
    recipe = run.recipe()
    device = torch.device("cuda", config["local_rank"]) if config["use_gpu"] else torch.device("cpu")
    if config["use_gpu"]:
        torch.cuda.set_device(device)
    log_to_file(run.log_file(config["stage"], config["attempt"], config["rank"]))
    torch.manual_seed(derive_seed(recipe.seed, "initial weights"))
    budget, bytes_before = open_budget(device, recipe.cluster.device_memory)
    return StageContext(
        run=run,
        recipe=recipe,
        number=config["stage"],
        device=device,
        ranks=ProcessGroupRanks(device),
        tokenizer=open_tokenizer(recipe),
        ledger=Ledger(run.ledger_file),
        budget=budget,
        bytes_before=bytes_before,
    )


def open_tokenizer(recipe: Recipe) -> CaptionTokenizer:
    """The tokenizer of the data: a local vocabulary file if the recipe names one, else the data's own."""
    path = recipe.data.vocabulary or storage_path(recipe.data.shards) / "train" / "vocab.txt"
    return CaptionTokenizer(path, recipe.loader.text_length)


def open_store(recipe: Recipe, name: Literal["train", "egomcq"]) -> ClipStore:
    """One of the recipe's two sets of clips."""
    shards_dir = storage_path(recipe.data.shards) / name
    return ClipStore(shards_dir, recipe.loader.cache_dir, recipe.loader.cache_gib)


def log_to_file(path: Path) -> None:
    """Sends this process's log lines to a file of the run directory as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def train(
    context: StageContext, engine: Engine, first_step: int, checkpoints: CheckpointStore, tracker: Tracker
) -> bool:
    """Trains from `first_step` on. Returns whether the stage reached its last step; False when stopped."""
    store = open_store(context.recipe, "train")
    pace = pace_of(context, len(store))
    if first_step == pace.num_steps:
        return True

    def save(step: int) -> None:
        began_s = time.monotonic()
        save_checkpoint(context, checkpoints, engine, step, pace.num_steps, store.manifest.fingerprint)
        tracker.metrics(step, {"perf/save_s": time.monotonic() - began_s})

    step_seed = derive_seed(context.recipe.seed, "step", context.number)
    train_step = TrainStep(
        engine,
        step_seed,
        context.ranks,
        pace.learning_rate_at,
        micro_batch_size_of(context),
        remember=partial(remember_micro_batch_size, context),
    )
    num_tags = (store.manifest.num_verbs, store.manifest.num_nouns)
    moments = 0
    if first_step == 0:
        num_parameters = context.model_config().num_parameters()
        moments = moment_bytes(num_parameters, context.recipe.engine, context.ranks.world_size)
    train_step.rehearse(rehearsal_of(context, train_step.micro_batch_size, num_tags), moments)
    watch = watch_memory(context, train_step.micro_batch_size, num_tags)
    hooks = Hooks(
        train_step=train_step,
        leave_out=DamagedSteps(
            context.ledger, context.number, context.recipe.loader.max_damaged_steps, context.ranks, tracker
        ),
        report=reporter(context, tracker, watch),
        save=save,
        stop_requested=context.run.stop_file.exists,
        clock=time.monotonic,
    )
    batches = build_loader(context, store).batches_from(first_step)
    finished = fit(batches, first_step, pace, hooks, context.ranks)
    checkpoints.wait(context.ranks.any)
    return finished == pace.num_steps


def micro_batch_size_of(context: StageContext) -> int | None:
    """The recipe's, unless memory has once not sufficed for it in this stage. Equal on all ranks."""
    remembered = context.ledger.read().stage(context.number).facts.get("micro_batch_size")
    return context.ranks.gather(remembered)[0] or context.stage.micro_batch_size


def remember_micro_batch_size(context: StageContext, size: int) -> None:
    """Into the ledger, so that a stage that starts again does not run out of memory again."""
    status = context.ledger.read().stage(context.number).status
    context.ledger.record_stage(context.number, status, micro_batch_size=size)


def rehearsal_of(context: StageContext, micro_batch_size: int | None, num_tags: tuple[int, int]) -> Batch:
    """This rank's most expensive batch."""
    num_clips = context.stage.clips_per_rank(context.ranks.world_size)
    length, rank = context.recipe.loader.text_length, context.ranks.rank
    return rehearsal_batch(context.model_config(), num_clips, micro_batch_size, length, num_tags, rank)


def watch_memory(
    context: StageContext, micro_batch_size: int | None, num_tags: tuple[int, int]
) -> MemoryWatch | None:
    """What the stage was predicted to take, against what it takes. The first rank computes the prediction, once for a
    stage: it takes seconds.
    """
    if context.budget is None:
        return None
    num_clips = context.stage.clips_per_rank(context.ranks.world_size)
    size = min(micro_batch_size or num_clips, num_clips)
    known = context.ledger.read().stage(context.number)
    asked = {"micro_batch_size": size, "world_size": context.ranks.world_size}
    fact = known.facts.get("predicted_memory", {})
    # An older version may have told other parts.
    is_known = fact.get("asked") == asked and set(fact["bytes"]) == set(Prediction._fields)
    if context.is_first_rank and not is_known:
        model, engine, world_size = context.model_config(), context.recipe.engine, context.ranks.world_size
        trace = trace_step(
            model,
            torch_dtype(engine),
            num_clips,
            size,
            context.recipe.loader.text_length,
            num_tags,
            world_size,
            on_gpu=context.device.type == "cuda",
        )
        found = predict(trace, engine_memory(model, engine, world_size))
        fact = {"asked": asked, "bytes": found._asdict()}
        context.ledger.record_stage(context.number, known.status, predicted_memory=fact)
    prediction = Prediction(**context.ranks.gather(fact)[0]["bytes"])
    return MemoryWatch(context.budget, context.bytes_before, prediction, context.ranks)


def pace_of(context: StageContext, num_clips: int) -> Pace:
    """Steps and learning rate of the stage over so many training clips."""
    recipe, stage = context.recipe, context.stage
    num_steps = num_stage_steps(stage, num_clips)

    def learning_rate_at(step: int) -> float:
        return stage.learning_rate * lr_factor(step, num_steps, stage.warmup_steps, stage.floor)

    return Pace(
        num_steps=num_steps,
        log_every_steps=recipe.log_every_steps,
        save_every_steps=recipe.checkpoint.every_steps,
        global_batch_size=stage.global_batch_size,
        learning_rate_at=learning_rate_at,
    )


def build_loader(context: StageContext, store: ClipStore) -> BatchLoader:
    """This rank's training batches; their order depends on the seed and the stage alone."""
    return BatchLoader(
        store,
        context.tokenizer,
        loader_that_fits(context),
        context.stage.num_frames,
        seed=derive_seed(context.recipe.seed, "order", context.number),
        global_batch_size=context.stage.global_batch_size,
        rank=context.ranks.rank,
        world_size=context.ranks.world_size,
        with_companions=context.stage.scene_companions,
        on_thread=context.budget.keep_thread_on_host if context.budget else lambda: None,
    )


def loader_that_fits(context: StageContext) -> LoaderConfig:
    """The recipe's loader, with fewer batches decoded ahead where the host lacks memory for them: a stage that was
    killed for want of it comes back with what is left. Collective.
    """
    loader, stage = context.recipe.loader, context.stage
    batch_bytes = stage.clips_per_rank(context.ranks.world_size) * stage.num_frames * 3 * loader.image_size**2
    host = socket.gethostname()
    on_this_host = context.ranks.gather(host).count(host)
    free_bytes = psutil.virtual_memory().available // on_this_host
    depth = batches_that_fit(loader.prefetch_batches, batch_bytes, free_bytes)
    return loader.model_copy(update={"prefetch_batches": depth})


def build_or_restore(context: StageContext, checkpoints: CheckpointStore) -> tuple[Engine, int]:
    """The engine, ready to train, and the number of steps it has behind it."""
    recipe, stage = context.recipe, context.stage
    model = VideoTextModel(context.model_config())
    if context.budget is not None:
        model.offload_within(context.budget.on_host)
    start = checkpoints.newest_good()
    if start is None:
        inherit_weights(context, model)
    engine = build_engine(
        model,
        parameter_groups(model, recipe.engine.weight_decay),
        recipe.engine,
        stage.global_batch_size // context.ranks.world_size,
        context.device,
    )
    engine.module.train()
    if start is None:
        return engine, 0
    engine.load(start.path)
    logger.info(
        "stage %d (%s) continues from step %d of %s", context.number, stage.name, start.step, start.path
    )
    return engine, start.step


def inherit_weights(context: StageContext, model: VideoTextModel) -> None:
    """Starts a later stage from the committed weights of the one before; its position tables are inflated.

    Raises StageError when that stage is not finished.
    """
    if context.number == 1:
        return
    before = context.ledger.read().stage(context.number - 1)
    if before.status not in ("trained", "done"):
        raise StageError(
            f"stage {context.number} starts from the weights of stage {context.number - 1}, which is "
            f"{before.status}: finish that one first (svitt resume {context.run.path})"
        )
    checkpoint = open_checkpoint(Path(before.facts["checkpoint"]))
    report = load_for_num_frames(model, checkpoint.load_weights(), context.recipe.inflation)
    logger.info("stage %d starts from %s: %s", context.number, checkpoint.path, report.summary())


def save_checkpoint(
    context: StageContext,
    checkpoints: CheckpointStore,
    engine: Engine,
    step: int,
    num_steps: int,
    fingerprint: str,
) -> None:
    """Commits the state after `step` steps; the ledger is told once it is published. Collective."""
    facts = {
        "stage": context.number,
        "stage_name": context.stage.name,
        "num_steps": num_steps,
        "world_size": context.ranks.world_size,
        "data_fingerprint": fingerprint,
        "recipe_hash": config_hash(context.recipe),
    }
    weights = engine.consolidated_state_dict()
    card = {**facts, "step": step, "model": context.model_config().model_dump(mode="json")}

    def record(path: Path) -> None:
        status = "trained" if step == num_steps else "running"
        context.ledger.record_stage(
            context.number, status, checkpoint=str(path), step=step, num_steps=num_steps
        )

    checkpoints.save(step, engine.save, facts, weights, card, any_rank=context.ranks.any, on_published=record)


def reporter(
    context: StageContext, tracker: Tracker, watch: MemoryWatch | None
) -> Callable[[Interval], None]:
    """Writes the numbers of an interval to the tracker, which is the journal on rank 0."""

    def report(interval: Interval) -> None:
        (peak_rss,) = context.ranks.max([float(peak_rss_bytes())])
        values = {f"train/{name}": value for name, value in asdict(interval.metrics).items()}
        values |= {
            "train/learning_rate": interval.learning_rate,
            "perf/clips_per_s": interval.clips_per_s,
            "perf/step_ms": interval.step_ms,
            "perf/data_wait_ms": interval.data_wait_ms,
            "mem/peak_rss_gib": peak_rss / GIB,
        }
        if watch is not None:
            values["mem/peak_device_gib"] = watch.measure() / GIB
            values["mem/predicted_device_gib"] = watch.predicted.total / GIB
        tracker.metrics(interval.step, values)
        tracker.flush()

    return report


def evaluate_stage(context: StageContext, checkpoints: CheckpointStore, tracker: Tracker) -> None:
    """Scores the committed weights of a finished stage and marks it done. Collective."""
    newest = checkpoints.newest_good()
    assert newest is not None, "a trained stage has a checkpoint"
    if context.recipe.data.egomcq is None:
        if context.is_first_rank:
            context.ledger.record_stage(context.number, "done")
        return
    evaluation = evaluate_weights(context, newest)
    tracker.metrics(newest.step, evaluation.metrics())
    tracker.flush()
    if context.is_first_rank:
        context.ledger.record_stage(context.number, "done", scores=evaluation.metrics())


def evaluate_weights(context: StageContext, checkpoint: Checkpoint) -> Evaluation:
    """EgoMCQ and the temporal probe of a checkpoint's weights. Collective."""
    model = VideoTextModel(context.model_config()).to(context.device)
    load_for_num_frames(model, checkpoint.load_weights())
    recipe = context.recipe
    encoder = Encoder(model, context.tokenizer, recipe.loader, recipe.evaluation.batch_size, context.device)
    with open_store(recipe, "egomcq") as store:
        return score_egomcq(
            encoder,
            store,
            read_questions(store.shards_dir),
            context.ranks,
            recipe.evaluation.max_unreadable_share,
        )
