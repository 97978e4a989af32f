"""One stage on one rank: the first page to read. What `train_worker` does is what a stage is.

Runs inside a worker process that Ray Train placed and joined with the others by torch.distributed.
"""

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from infra.checkpoint import Checkpoint, CheckpointError, CheckpointStore, open_checkpoint
from infra.config_io import config_hash
from infra.engine import Engine, build_engine, torch_dtype
from infra.engine_memory import moment_bytes
from infra.journal import Journal, NullTracker, Tracker
from infra.ledger import EndKind, FencedError, Ledger, StageStatus
from infra.memory_budget import Budget
from infra.redaction import RedactingFilter
from infra.runtime import compute_repeatably, peak_rss_bytes
from infra.system_metrics import Gpu, SystemMetrics, cpu_name, open_gpu
from jobs.answers import ANSWERS_FILES, write_answers
from jobs.drift import require_history
from jobs.evaluate import Encoder, Evaluation, score_egomcq
from jobs.heartbeat import HangWatch, Heartbeat, last_step
from jobs.left_out import LeftOutSteps
from jobs.loss_spikes import SpikeWatch
from jobs.memory_plan import Prediction, engine_memory, predict
from jobs.memory_watch import MemoryWatch, batches_that_fit, open_budget
from jobs.ranks import Ranks, ranks_of_group
from jobs.recipe import Recipe, StageConfig, num_stage_steps
from jobs.rehearsal import rehearsal_batch
from jobs.retry_budget import Budgets, give_up_reason, spent
from jobs.run_dir import RunDir
from jobs.step_memory import trace_step
from jobs.summary import INTRA, SCORED_CHECKPOINTS
from jobs.train_loop import HalvedError, Hooks, Interval, Pace, RollbackError, fit
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
_LAG_SHARE = 0.2  # of a step, from which on a slow rank is told
# How gloo, NCCL and torch's store speak of a rank that is gone or silent.
_LOST_RANK = (
    "connection closed",
    "connection reset",
    "connection refused",
    "timed out",
    "timeout",
    "ncclremote",
    "broken pipe",
)


class StageError(RuntimeError):
    """A stage that cannot start; the message says what it needs."""


@dataclass(frozen=True)
class StageContext:
    """What every part of a stage's work on one rank looks at. `generation`: see `Ledger.record_start`; `beat(step,
    phase)` is the sign of life.
    """

    run: RunDir
    recipe: Recipe
    number: int
    device: torch.device
    ranks: Ranks
    tokenizer: CaptionTokenizer
    ledger: Ledger
    attempt: int = 0
    generation: int = 0
    beat: Callable[[int, str], None] = lambda step, phase: None
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

    def require_newest(self) -> None:
        """Raises FencedError when another start has taken over from this one."""
        with self.ledger.fenced(self.generation):
            pass


def train_worker(config: dict[str, Any]) -> None:
    """Trains one stage to its end or until stopped, then scores it. Safe to run again at any point.

    `config`: run_dir, stage (from 1), attempt, use_gpu; rank, local_rank, world_size and is_preempted are filled in by
    `run_workers`.
    """
    context = build_context(config)
    if gives_up(context):
        return
    rank = context.ranks.rank
    heartbeat = Heartbeat(context.run.heartbeats(context.number) / f"rank-{rank}", context.generation, rank)
    heartbeat.beat(0, "start")
    context = replace(context, beat=heartbeat.beat)
    stacks = context.run.log_file(context.number, context.attempt, rank).with_suffix(".stacks")
    patience_s = context.recipe.cluster.collective_timeout_s / 2
    with HangWatch(heartbeat, stacks, patience_s), telling_the_end(context):
        run_stage_on_rank(context, config["is_preempted"])


def run_stage_on_rank(context: StageContext, is_preempted: Callable[[], bool]) -> None:
    """What a stage is: restore or inherit, train, score."""
    checkpoints = CheckpointStore(
        context.run.checkpoints(context.number),
        rank=context.ranks.rank,
        world_size=context.ranks.world_size,
        keep_last=context.recipe.checkpoint.keep_last,
        generation=context.generation,
        mirror=mirror_of(context),
        protect=partial(best_steps, context),
    )
    context.ranks.barrier()
    engine, first_step = build_or_restore(context, checkpoints)
    tracker = (
        Journal(context.run.journal(context.number), first_step, generation=context.generation)
        if context.is_first_rank
        else NullTracker()
    )
    tracker.params(stage_params(context))
    tracker.tags({"device": device_name(context.device)})
    try:
        if train(context, engine, first_step, checkpoints, tracker, is_preempted):
            del engine
            evaluate_stage(context, checkpoints, tracker)
    finally:
        tracker.close()
        checkpoints.finish_mirror()


def gives_up(context: StageContext) -> bool:
    """Whether the budgets of the stage are spent: then it is marked as failed, with the reason. Collective."""
    reason = None
    if context.is_first_rank:
        state = context.ledger.read()
        first = state.facts.get("budget_from", 0)
        starts = [start for start in state.stage(context.number).starts if start.generation > first]
        cluster, guard = context.recipe.cluster, context.recipe.guard
        budgets = Budgets(
            cluster.max_failures,
            cluster.max_crashes_at_one_step,
            cluster.max_preemptions,
            guard.max_rollbacks,
        )
        reason = give_up_reason(spent(starts), budgets)
        if reason is not None:
            context.ledger.record_end(context.number, context.generation, "gave_up", reason)
            context.ledger.record_stage(context.number, "failed", reason=reason)
            logger.error("stage %d is given up: %s", context.number, reason)
    return context.ranks.gather(reason)[0] is not None


@contextmanager
def telling_the_end(context: StageContext) -> Iterator[None]:
    """Writes to the ledger how the work of this rank ended; a rank that is killed writes nothing, which tells too."""
    try:
        yield
    except FencedError:
        raise
    except Exception as error:
        reason = f"rank {context.ranks.rank}: {type(error).__name__}: {error}"
        context.ledger.record_end(context.number, context.generation, end_kind(error), reason)
        raise
    if context.is_first_rank:
        status = context.ledger.read().stage(context.number).status
        kind = "done" if status == "done" else "stopped"
        if kind == "stopped":
            context.ledger.record_stage(context.number, "stopped")
        context.ledger.record_end(context.number, context.generation, kind)


def end_kind(error: Exception) -> EndKind:
    """What an error says of a start. Ranks that lose another one meet errors of torch.distributed: not theirs."""
    if isinstance(error, RollbackError):
        return "rollback"
    if isinstance(error, HalvedError):
        return "halved"
    text = str(error).lower()
    is_lost = any(sign in text for sign in _LOST_RANK)
    return "collateral" if isinstance(error, RuntimeError) and is_lost else "error"


def stage_params(context: StageContext) -> dict[str, Any]:
    """What tells this stage from others, for the tracker: its settings, its ranks, the size of its model. The random
    blocks of a patch are "all" where attention is dense.
    """
    model = context.model_config()
    video = model.video
    return {
        **context.stage.model_dump(mode="json", exclude_none=True),
        "seed": context.recipe.seed,
        "world_size": context.ranks.world_size,
        "zero_stage": context.recipe.engine.zero_stage,
        "num_random_blocks": "all" if video.num_random_blocks is None else video.num_random_blocks,
        "num_parameters": model.num_parameters(),
        "tokens_in": video.tokens_by_layer()[0],
        "tokens_out": video.tokens_by_layer()[-1],
    }


def device_name(device: torch.device) -> str:
    """What the ranks compute on, as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def build_context(config: dict[str, Any]) -> StageContext:
    """Prepares the process (device, log file, seed), opens what all steps share, and says in the ledger that the ranks
    are up: the only side effects.
    """
    run = RunDir(Path(config["run_dir"]))
    recipe = run.recipe()
    number, attempt = config["stage"], config["attempt"]
    device = torch.device("cuda", config["local_rank"]) if config["use_gpu"] else torch.device("cpu")
    if config["use_gpu"]:
        torch.cuda.set_device(device)
        compute_repeatably()
    log_to_file(run.log_file(number, attempt, config["rank"]))
    torch.manual_seed(derive_seed(recipe.seed, "initial weights"))
    ranks, ledger = ranks_of_group(device), Ledger(run.ledger_file)
    generation = ranks.gather(record_start(run, ledger, number, attempt) if ranks.rank == 0 else None)[0]
    budget, bytes_before = open_budget(device, recipe.cluster.device_memory)
    return StageContext(
        run=run,
        recipe=recipe,
        number=number,
        device=device,
        ranks=ranks,
        tokenizer=open_tokenizer(recipe),
        ledger=ledger,
        attempt=attempt,
        generation=generation,
        budget=budget,
        bytes_before=bytes_before,
    )


def record_start(run: RunDir, ledger: Ledger, number: int, attempt: int) -> int:
    """A new generation, with the step in which the one before was lost."""
    starts = ledger.read().stage(number).starts
    died_at = None
    if starts and starts[-1].ended not in ("done", "stopped", "gave_up"):
        died_at = last_step(run.heartbeats(number), starts[-1].generation)
    return ledger.record_start(number, attempt, died_at)


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
    handler.addFilter(RedactingFilter())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def train(
    context: StageContext,
    engine: Engine,
    first_step: int,
    checkpoints: CheckpointStore,
    tracker: Tracker,
    is_preempted: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains from `first_step` on. Returns whether the stage reached its last step; False when stopped."""
    store = open_store(context.recipe, "train")
    pace = pace_of(context, len(store))
    if first_step == pace.num_steps:
        return True
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
    saver = StageSaver(context, checkpoints, engine, tracker, pace.num_steps, store.manifest.fingerprint)
    hooks = Hooks(
        train_step=train_step,
        left_out=LeftOutSteps(
            context.ledger,
            context.number,
            context.ranks,
            tracker,
            context.recipe.loader.max_damaged_steps,
            context.recipe.guard.max_nonfinite_in_a_row,
        ),
        report=reporter(context, tracker, watch),
        save=saver,
        save_soon=PreemptionNotice(context, is_preempted),
        stop_requested=lambda: context.is_first_rank and context.run.stop_file.exists(),
        beat=lambda step: context.beat(step, "step"),
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
        found = predict(trace, engine_memory(model, engine, world_size), context.device.type == "cuda")
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
        require_history(context.ledger.read(), context.number, context.run)
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


class StageSaver:
    """Commits the state of a stage, then says so in the ledger: `Hooks.save`.

    A save that fails leaves the checkpoints of before as they are. Training goes on and the next one is due as ever;
    only where the state would be lost otherwise (the last one of a stage, or before a stop) is it an error.
    """

    def __init__(
        self,
        context: StageContext,
        checkpoints: CheckpointStore,
        engine: Engine,
        tracker: Tracker,
        num_steps: int,
        fingerprint: str,
    ) -> None:
        self._context, self._checkpoints, self._engine, self._tracker = context, checkpoints, engine, tracker
        self._num_steps, self._fingerprint = num_steps, fingerprint
        self._num_failed = 0

    def __call__(self, step: int, is_last: bool) -> None:
        """Collective. Raises CheckpointError when `is_last` and the state could not be saved."""
        context = self._context
        context.beat(step, "save")
        began_s = time.monotonic()
        self._attempt(step, lambda: self._checkpoints.wait(context.ranks.any), must_succeed=False)
        self._attempt(step, lambda: self._save(step), must_succeed=is_last)
        self._tracker.metrics(step, {"perf/save_s": time.monotonic() - began_s})
        every = context.recipe.evaluation.every_steps
        if every is not None and step % every == 0 and step < self._num_steps:
            self._score(step)

    def _attempt(self, step: int, action: Callable[[], None], must_succeed: bool) -> None:
        try:
            action()
        except CheckpointError as error:
            if must_succeed:
                raise
            self._num_failed += 1
            logger.error("at step %d: %s; training goes on, the next save is due as ever", step, error)
            self._tracker.metrics(step, {"perf/failed_saves": float(self._num_failed)})

    def _save(self, step: int) -> None:
        context = self._context
        facts = {
            "stage": context.number,
            "stage_name": context.stage.name,
            "num_steps": self._num_steps,
            "world_size": context.ranks.world_size,
            "data_fingerprint": self._fingerprint,
            "recipe_hash": config_hash(context.recipe),
        }
        weights = self._engine.consolidated_state_dict()
        card = {**facts, "step": step, "model": context.model_config().model_dump(mode="json")}
        self._checkpoints.save(
            step,
            self._engine.save,
            facts,
            weights,
            card,
            any_rank=context.ranks.any,
            before_publish=context.require_newest,
            on_published=partial(self._record, step),
        )

    def _record(self, step: int, path: Path) -> None:
        """On the first rank, in the thread that publishes."""
        status: StageStatus = "trained" if step == self._num_steps else "running"
        self._context.ledger.record_stage(
            self._context.number, status, checkpoint=str(path), step=step, num_steps=self._num_steps
        )
        self._tracker.saved(step)

    def _score(self, step: int) -> None:
        context = self._context
        self._checkpoints.wait(context.ranks.any)
        context.beat(step, "score")
        newest = self._checkpoints.newest_good()
        if newest is None or newest.step != step or context.recipe.data.egomcq is None:
            return
        scores = evaluate_weights(context, newest).metrics()
        self._tracker.metrics(step, scores)
        if context.is_first_rank:
            state = context.ledger.read().stage(context.number)
            scored = {**state.facts.get(SCORED_CHECKPOINTS, {}), str(step): scores}
            context.ledger.record_stage(context.number, state.status, **{SCORED_CHECKPOINTS: scored})


def best_steps(context: StageContext) -> list[int]:
    """Steps of the scored checkpoints that are kept for their EgoMCQ intra, the best ones."""
    scored = context.ledger.read().stage(context.number).facts.get(SCORED_CHECKPOINTS, {})
    ranked = sorted(scored, key=lambda step: scored[step].get(f"{INTRA}_acc", 0.0), reverse=True)
    return [int(step) for step in ranked[: context.recipe.checkpoint.keep_best]]


def mirror_of(context: StageContext) -> str | None:
    """Where copies of this stage's checkpoints go; a run that was started afresh finds none of the one before."""
    mirror, path = context.recipe.checkpoint.mirror, context.run.path
    if mirror is None:
        return None
    life = len(list(path.parent.glob(f"{path.name}.old-*")))
    return f"{mirror.rstrip('/')}/{context.run.run_id}-{life}/stage-{context.number}"


def reporter(
    context: StageContext, tracker: Tracker, watch: MemoryWatch | None
) -> Callable[[Interval], None]:
    """Writes the numbers of an interval to the tracker, which is the journal on rank 0. Raises FencedError when another
    start has taken over.
    """
    spikes = SpikeWatch(context.recipe.guard.spike_window, context.recipe.guard.spike_sigma)
    system = SystemMetrics(context.run.path, gpu_of(context.device)) if context.is_first_rank else None

    def report(interval: Interval) -> None:
        if context.is_first_rank:
            context.require_newest()
        (peak_rss,) = context.ranks.max([float(peak_rss_bytes())])
        values = {f"train/{name}": value for name, value in asdict(interval.metrics).items()}
        values |= {
            "train/learning_rate": interval.learning_rate,
            "perf/clips_per_s": interval.clips_per_s,
            "perf/step_ms": interval.step_ms,
            "perf/data_wait_ms": interval.data_wait_ms,
            "perf/busy_s": (interval.step_ms - interval.data_wait_ms) * interval.num_steps / 1e3,
            "perf/wait_s": interval.data_wait_ms * interval.num_steps / 1e3,
            "perf/rank_lag_ms": interval.rank_lag_ms,
            "mem/peak_rss_gib": peak_rss / GIB,
        }
        if system is not None:
            values |= system.sample()
        if watch is not None:
            values["mem/peak_device_gib"] = watch.measure() / GIB
            values["mem/predicted_device_gib"] = watch.predicted.total / GIB
        for step, loss in interval.losses:
            if (score := spikes.add(loss)) is not None:
                values["train/loss_spike"] = loss
                tracker.tags(
                    {f"loss_spike.{step}": f"{loss:.4g}, {score:.1f} standard deviations above the usual"}
                )
                logger.warning(
                    "step %d: loss %.4g is a spike, %.1f standard deviations up", step, loss, score
                )
        if interval.rank_lag_ms > _LAG_SHARE * interval.step_ms:
            logger.warning(
                "steps to %d: rank %d keeps the others waiting, up to %.0f ms of a step's %.0f",
                interval.step,
                interval.slowest_rank,
                interval.rank_lag_ms,
                interval.step_ms,
            )
        tracker.metrics(interval.step, values)
        tracker.flush()

    return report


def gpu_of(device: torch.device) -> Gpu | None:
    """NVML's view of the device, which it knows by its place on the bus."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return open_gpu(f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0")


class PreemptionNotice:
    """`Hooks.save_soon`: whether this machine is about to be taken away, said once. What ends the start is no crash
    then, which the ledger keeps.
    """

    def __init__(self, context: StageContext, is_preempted: Callable[[], bool]) -> None:
        self._context, self._is_preempted = context, is_preempted
        self._has_told = False

    def __call__(self) -> bool:
        """Collective."""
        if self._has_told or not self._context.ranks.any(self._is_preempted()):
            return False
        self._has_told = True
        logger.warning("a machine of this stage is about to be taken away; the state is saved now")
        if self._context.is_first_rank:
            self._context.ledger.record_preemption(self._context.number, self._context.generation)
        return True


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
        facts = {
            "run": context.run.run_id,
            "stage": context.number,
            "stage_name": context.stage.name,
            "checkpoint": newest.path.name,
            "step": newest.step,
            "mode": "dual",
        }
        write_answers(
            context.run.stage_dir(context.number) / ANSWERS_FILES["dual"], evaluation.answers, facts
        )
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
