"""The fastest settings of engine, recomputation and micro-batch that fit a device's memory.

Times are rough: they put candidates in order and are not shown as seconds. What they weigh is how often a clip is
encoded, how much the ranks send each other and the host, and how many small calls a device is given.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import ceil
from multiprocessing import get_context
from typing import Any

from infra.config import EngineConfig
from infra.engine import torch_dtype
from jobs.memory_plan import Prediction, engine_memory, predict
from jobs.step_memory import StepBytes, StepTrace, trace_step
from model.config import ModelConfig

# Of a mid-size GPU, of its links, and of a call that is too small to fill it.
_FLOPS_PER_S = 40e12
_LINK_BYTES_PER_S = 12e9
_CALL_S = 0.01
# Reads and writes of AdamW on the host, bytes for each trained parameter.
_HOST_UPDATE_BYTES = 40


@dataclass(frozen=True, slots=True)
class Recompute:
    """What both encoders compute again instead of keeping it."""

    video: str = "none"
    text: str = "none"
    offload: bool = False

    def apply(self, model: ModelConfig) -> ModelConfig:
        video = {"recompute": self.video, "offload_activations": self.offload and self.video != "none"}
        text = {"recompute": self.text, "offload_activations": self.offload and self.text != "none"}
        return model.replaced(video=video, text=text)

    def again(self, model: ModelConfig, text_length: int) -> float:
        """GMACs of one clip that are computed once more."""
        gmacs = model.gmacs_per_clip(text_length)
        video = {"none": 0.0, "all_but_attention": 0.95, "all": 1.0}[self.video] * gmacs.video
        return video + (gmacs.training_forward - gmacs.video if self.text != "none" else 0.0)


@dataclass(frozen=True, slots=True)
class Workload:
    """A stage as memory sees it: its model, and the clips of a step on each of `world_size` ranks."""

    name: str
    model: ModelConfig
    clips_per_rank: int
    world_size: int
    text_length: int
    num_tags: tuple[int, int]
    num_steps: int = 1
    on_gpu: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """All that may be chosen without changing what is learned."""

    engine: EngineConfig
    recompute: Recompute


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings of a stage with a micro-batch, and what they take."""

    settings: Settings
    micro_batch_size: int
    prediction: Prediction
    seconds: float  # of one step, for comparison only


def candidates(
    engine: EngineConfig, model: ModelConfig, world_size: int, has_kernel: bool
) -> Iterator[Settings]:
    """Everything that is worth a try from the recipe's own engine on. `has_kernel`: attention runs as one operation,
    whose result can be kept.
    """
    recomputes = [Recompute()]
    if has_kernel:
        recomputes.append(Recompute(video="all_but_attention"))
    recomputes += [Recompute(video="all"), Recompute("all", "all"), Recompute("all", "all", offload=True)]
    for changes in _engines(engine, world_size):
        for recompute in recomputes:
            yield Settings(EngineConfig.model_validate({**engine.model_dump(), **changes}), recompute)


def _engines(engine: EngineConfig, world_size: int) -> Iterator[dict[str, object]]:
    if engine.backend == "plain":
        yield {}
        return
    none = {"offload_optimizer": "none", "offload_parameters": "none", "nvme_path": None}
    yield {**none, "zero_stage": 1, "gradient_reduction": "step"}
    if world_size > 1:
        yield {**none, "zero_stage": 2, "gradient_reduction": "backward"}
        yield {**none, "zero_stage": 3, "gradient_reduction": "step"}
        yield {**none, "zero_stage": 3, "gradient_reduction": "backward"}
    if engine.optimizer == "adamw_8bit":
        return
    on_host = {**none, "offload_optimizer": "cpu"}
    yield {**on_host, "zero_stage": 2, "gradient_reduction": "step"}
    yield {**on_host, "zero_stage": 2, "gradient_reduction": "backward"}
    yield {**on_host, "zero_stage": 3, "gradient_reduction": "backward", "offload_parameters": "cpu"}


def step_seconds(work: Workload, settings: Settings, micro_batch_size: int) -> float:
    """Rough time of one step; see the head of this file."""
    engine, model = settings.engine, work.model
    num_pieces = ceil(work.clips_per_rank / micro_batch_size)
    gmacs = model.gmacs_per_clip(work.text_length)
    encode = gmacs.training_forward
    per_clip = 3 * encode + settings.recompute.again(model, work.text_length)
    num_passes = 3 + (settings.recompute != Recompute())
    if num_pieces > 1:
        per_clip += gmacs.video + gmacs.text
        num_passes += 1
    seconds = work.clips_per_rank * per_clip * 2e9 / _FLOPS_PER_S + num_pieces * num_passes * _CALL_S

    width = 2 if engine.precision == "bf16" else 4
    parameters = width * model.num_parameters()
    shared = (work.world_size - 1) / work.world_size
    reduces_often = engine_memory(model, engine, work.world_size).partial_gradients is not None
    traffic = 2 * parameters * shared * (num_pieces if reduces_often else 1)
    if engine.zero_stage == 3:
        traffic += parameters * shared * num_pieces * num_passes
    if engine.offload_optimizer != "none":
        traffic += (2 * parameters + _HOST_UPDATE_BYTES * model.num_parameters()) / work.world_size
    if engine.offload_parameters != "none":
        traffic += parameters * num_pieces * num_passes / work.world_size
    if settings.recompute.offload:
        tokens = sum(model.video.tokens_by_layer()[:-1])
        traffic += 2 * width * tokens * model.video.width * work.clips_per_rank
    return seconds + traffic / _LINK_BYTES_PER_S


class Planner:
    """Predictions for workloads, each rehearsal traced once. `trace` is `trace_step`."""

    def __init__(self, trace: Callable[..., StepTrace] = trace_step) -> None:
        self._trace = trace
        self._known: dict[tuple[Any, ...], StepTrace] = {}

    def prepare(
        self, works: Sequence[Workload], settings: Sequence[Settings], num_processes: int
    ) -> Iterator[int]:
        """Traces what a search will ask for in any case, side by side; yields how many are left. Each takes seconds."""
        asked = {
            self._arguments(work, some, size): None
            for work in works
            for some in settings
            for size in (1, 2)
            if size <= work.clips_per_rank
        }
        missing = [arguments for arguments in asked if arguments not in self._known]
        # Spawned, since torch's threads do not survive a fork.
        with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
            for number, trace in enumerate(pool.map(self._trace, *zip(*missing, strict=True))):
                self._known[missing[number]] = trace
                yield len(missing) - number - 1

    def predict(self, work: Workload, settings: Settings, micro_batch_size: int) -> Prediction:
        """Of exactly these settings."""
        return self._with(work, settings, self._traced(work, settings, micro_batch_size))

    def largest(self, work: Workload, settings: Settings, memory_bytes: int) -> Choice | None:
        """The largest micro-batch that should fit with these settings, by two traces; None when not one clip does."""
        if self.predict(work, settings, 1).total > memory_bytes:
            return None
        size = self._guess(work, settings, memory_bytes) if work.clips_per_rank > 1 else 1
        prediction = self._grown(work, settings, size)
        return Choice(settings, size, prediction, step_seconds(work, settings, size))

    def proven(self, work: Workload, choice: Choice, memory_bytes: int) -> Choice:
        """The same to the clip: one more does not fit, as a trace of just that size says."""
        size, settings = choice.micro_batch_size, choice.settings
        while size > 1 and self.predict(work, settings, size).total > memory_bytes:
            size -= 1
        while size < work.clips_per_rank and self.predict(work, settings, size + 1).total <= memory_bytes:
            size += 1
        prediction = self.predict(work, settings, size)
        return Choice(settings, size, prediction, step_seconds(work, settings, size))

    def _guess(self, work: Workload, settings: Settings, memory_bytes: int) -> int:
        def fits(size: int) -> bool:
            return self._grown(work, settings, size).total <= memory_bytes

        half = max(1, work.clips_per_rank // 2)
        low, high = (half, work.clips_per_rank) if fits(half) else (1, half - 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def _grown(self, work: Workload, settings: Settings, size: int) -> Prediction:
        """Memory grows evenly with the micro-batch, so that by two of them the others are known, but for few bytes.
        Where two micro-batches are not equal, the smaller one meets the gradients, and a trace has to tell.
        """
        if size <= 2 or 2 * size > work.clips_per_rank:
            return self.predict(work, settings, size)
        one, two = (self._traced(work, settings, some) for some in (1, 2))
        whole, partial = (
            StepBytes(*(a + (size - 1) * (b - a) for a, b in zip(first, second, strict=True)))
            for first, second in zip(one[:2], two[:2], strict=True)
        )
        return self._with(
            work, settings, StepTrace(whole, partial, one.host + (size - 1) * (two.host - one.host))
        )

    def _traced(self, work: Workload, settings: Settings, micro_batch_size: int) -> StepTrace:
        arguments = self._arguments(work, settings, micro_batch_size)
        if arguments not in self._known:
            self._known[arguments] = self._trace(*arguments)
        return self._known[arguments]

    @staticmethod
    def _arguments(work: Workload, settings: Settings, micro_batch_size: int) -> tuple[Any, ...]:
        return (
            settings.recompute.apply(work.model),
            torch_dtype(settings.engine),
            work.clips_per_rank,
            micro_batch_size,
            work.text_length,
            work.num_tags,
            work.world_size,
            work.on_gpu,
        )

    @staticmethod
    def _with(work: Workload, settings: Settings, trace: StepTrace) -> Prediction:
        memory = engine_memory(work.model, settings.engine, work.world_size)
        return predict(trace, memory, work.on_gpu)


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen settings with a micro-batch for each stage, and the fastest that did not fit."""

    choices: tuple[Choice, ...]
    wish: "Wish | None"


@dataclass(frozen=True, slots=True)
class Wish:
    """Faster settings that miss the memory, by so many bytes in this stage, with one micro-batch of this size."""

    settings: Settings
    stage: str
    micro_batch_size: int
    missing_bytes: int


def usable_bytes(memory_bytes: int) -> int:
    """What predictions may fill: one that filled 99.9 % (base, 16 frames, 3 GiB) ran short by half a percent."""
    return memory_bytes - memory_bytes // 100


def search(
    works: Sequence[Workload],
    settings: Sequence[Settings],
    memory_bytes: int,
    host_bytes: int,
    planner: Planner,
) -> Plan | Wish:
    """The fastest settings that fit all stages, each with its largest micro-batch; where none fits, what misses
    by least.

    Engine and recomputation are one choice for a run, the micro-batch is each stage's own. `host_bytes` is what each
    rank may offload.
    """

    def at_best(some: Settings) -> float:
        return sum(w.num_steps * step_seconds(w, some, w.clips_per_rank) for w in works)

    best: tuple[float, tuple[Choice, ...]] | None = None
    wishes: list[tuple[float, Wish]] = []
    for some in sorted(settings, key=at_best):
        if best is not None and at_best(some) >= best[0]:
            break
        if engine_memory(works[0].model, some.engine, works[0].world_size).host > host_bytes:
            continue
        found: list[Choice] = []
        for work in works:
            choice = planner.largest(work, some, memory_bytes)
            if choice is None:
                missing = planner.predict(work, some, 1).total - memory_bytes
                wishes.append((at_best(some), Wish(some, work.name, 1, missing)))
                break
            if choice.prediction.host > host_bytes:
                break
            found.append(choice)
        else:
            seconds = sum(w.num_steps * c.seconds for w, c in zip(works, found, strict=True))
            if best is None or seconds < best[0]:
                best = seconds, tuple(found)
    if best is None:
        if not wishes:
            raise PlanError("no settings leave enough host memory for what they offload")
        return min((wish for _, wish in wishes), key=lambda wish: wish.missing_bytes)
    choices = tuple(planner.proven(w, c, memory_bytes) for w, c in zip(works, best[1], strict=True))
    larger = [
        Wish(c.settings, w.name, c.micro_batch_size + 1, more.total - memory_bytes)
        for w, c in zip(works, choices, strict=True)
        if c.micro_batch_size < w.clips_per_rank
        and (more := planner.predict(w, c.settings, c.micro_batch_size + 1))
    ]
    faster = [wish for seconds, wish in wishes if seconds < best[0]]
    return Plan(choices, min((*faster, *larger), key=lambda wish: wish.missing_bytes, default=None))


class PlanError(RuntimeError):
    """A plan that cannot be made; the message says why."""
