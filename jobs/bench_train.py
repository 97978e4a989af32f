"""`svitt bench train`: memory and time of the training step on this machine, as tables and a record.

Three parts: the contrastive batch against memory, and what the second pass costs (`batch`); the engines on two ranks
(`engines`); what the pipeline costs around the step (`overhead`). Times of the first two are taken under the counting
allocator, and figures count only against others of the same run.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.table import Table

from infra.config import EngineConfig
from jobs.bench_overhead import Overhead, measure_overhead, one_stage, overhead_lines
from jobs.bench_record import BenchError, Ratio, Record, Spread, print_table
from jobs.bench_train_worker import Shape, TimeLimitError, arguments_of, ask
from jobs.progress import ProgressReport
from jobs.recipe import Recipe
from jobs.submit import require_shards

RECORD_VERSION = 1
Part = Literal["batch", "engines", "overhead"]
PARTS: tuple[Part, ...] = ("batch", "engines", "overhead")
PLAIN = "plain"
ENGINES = {
    PLAIN: EngineConfig(backend="plain"),
    **{f"ZeRO {stage}": EngineConfig(zero_stage=stage) for stage in (0, 1, 2, 3)},
    "ZeRO 2 reducing in backward": EngineConfig(zero_stage=2, gradient_reduction="backward"),
    "ZeRO 3 reducing in backward": EngineConfig(zero_stage=3, gradient_reduction="backward"),
    **{f"ZeRO {s} offload": EngineConfig(zero_stage=s, offload_optimizer="cpu") for s in (1, 2, 3)},
    "ZeRO 3 offload all": EngineConfig(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu"),
}
_RANKS = 2
_MIB = 2**20
Keep = Callable[[str, Any], None]
Answers = Sequence[dict[str, Any]]  # of the ranks


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What to measure. `limit_s` is for one case: a longer one is left out and said. `steps` of the overhead's stage
    are a multiple of its `checkpoint.every_steps`; None: ten times that.
    """

    parts: tuple[Part, ...] = PARTS
    size: str = "small"
    num_frames: int = 4
    micro_batch_size: int = 8
    batches: tuple[int, ...] = (64, 256, 1024, 4096)
    pass_batch: int = 16
    engine_batch: int = 32
    engines: tuple[str, ...] = tuple(ENGINES)
    rounds: int = 3
    limit_s: float = 5400.0
    stage: int = 1
    steps: int | None = None

    @staticmethod
    def quick() -> "TrainPlan":
        """The tiny model and one sample: a look, no figure to publish."""
        return TrainPlan(size="tiny", batches=(64, 256), rounds=1)

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """Of the cost of the second pass: the whole batch first, which is one pass."""
        sizes = {self.pass_batch, self.pass_batch // 2, self.micro_batch_size}
        return tuple(sorted(sizes, reverse=True))

    def shape(self, num_clips: int) -> Shape:
        return Shape(self.size, self.num_frames, num_clips, self.micro_batch_size)


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One step over a whole batch. `resident_bytes` are there before it: weights, their copies, moments of AdamW.
    `growth` of the peak is over the smallest batch, in percent.
    """

    batch_size: int
    step_s: float
    clips_per_s: float
    resident_bytes: int
    peak_device_bytes: int
    growth: float


@dataclass(frozen=True, slots=True)
class PassRow:
    """A step in micro-batches of a size. Ratios are to the step in one pass."""

    micro_batch_size: int
    wall_s: Spread
    cpu_s: Spread
    wall: Ratio
    cpu: Ratio


@dataclass(frozen=True, slots=True)
class EngineRow:
    """An engine on two ranks; the bytes are those of the rank that holds more. `to_plain` is of the step's time."""

    name: str
    step_s: Spread
    clips_per_s: float
    peak_device_bytes: int
    peak_host_bytes: int
    to_plain: Ratio


def bench_train(
    plan: TrainPlan, recipe: Recipe | None, num_threads: int, record_file: Path, report: ProgressReport
) -> int:
    """Measures, prints the tables, writes the record. `recipe` is that of the overhead. Raises BenchError for settings
    that cannot be measured and for a process that fails, and what `require_shards` does.
    """
    _check(plan, recipe, num_threads)
    keep = Record(record_file, RECORD_VERSION, num_threads, asdict(plan)).keep

    if "batch" in plan.parts:
        _bench_batches(plan, num_threads, report, keep)
        _bench_passes(plan, num_threads, report, keep)
    if "engines" in plan.parts:
        _bench_engines(plan, num_threads, report, keep)
    if "overhead" in plan.parts:
        assert recipe is not None, "checked"
        _bench_overhead(plan, recipe, report, keep)
    report.say(f"record: {record_file}")
    return 0


def _check(plan: TrainPlan, recipe: Recipe | None, num_threads: int) -> None:
    numbers = {
        "threads": num_threads,
        "frames": plan.num_frames,
        "micro-batch": plan.micro_batch_size,
        "rounds": plan.rounds,
        "limit-s": plan.limit_s,
    }
    low = {name: value for name, value in numbers.items() if value < 1}
    if low:
        raise BenchError(f"settings that cannot be measured: {low}; each has to be 1 or more")
    if "batch" in plan.parts:
        _check_batches(plan)
    if "engines" in plan.parts:
        unknown = [name for name in plan.engines if name not in ENGINES]
        if unknown or PLAIN not in plan.engines:
            raise BenchError(
                f"engines are {plan.engines}; {PLAIN} has to be one of them, the others of {', '.join(ENGINES)}"
            )
        if plan.engine_batch % _RANKS or plan.engine_batch // _RANKS < plan.micro_batch_size:
            raise BenchError(
                f"a batch of {plan.engine_batch} for the engines does not give each of {_RANKS} ranks a micro-batch of "
                f"{plan.micro_batch_size}; choose another --engine-batch or a smaller --micro-batch"
            )
    if "overhead" in plan.parts:
        _check_overhead(plan, recipe)


def _check_batches(plan: TrainPlan) -> None:
    if min(plan.batches, default=0) < plan.micro_batch_size or plan.pass_batch <= plan.micro_batch_size:
        raise BenchError(
            f"batches are {plan.batches} and {plan.pass_batch} for the passes, micro-batches have "
            f"{plan.micro_batch_size} clips; choose larger --batches, a larger --pass-batch or a smaller --micro-batch"
        )
    side = plan.shape(1).model_config().video.image_size
    pixel_bytes = max(plan.batches) * plan.num_frames * 3 * side**2
    available = psutil.virtual_memory().available
    if pixel_bytes > available / 2:
        raise BenchError(
            f"the pixels of {max(plan.batches)} clips take {pixel_bytes:,} bytes of host memory, {available:,} are "
            "available; choose smaller --batches or fewer --frames"
        )


def _check_overhead(plan: TrainPlan, recipe: Recipe | None) -> None:
    if recipe is None:
        raise BenchError("the overhead is that of a recipe's stage, and no recipe is given")
    if not 1 <= plan.stage <= len(recipe.stages):
        raise BenchError(
            f"there is no stage {plan.stage} in {recipe.name}; there are 1 to {len(recipe.stages)}"
        )
    if recipe.cluster.use_gpu:
        raise BenchError("cluster.use_gpu is set, and the bare loop runs on the CPU; set it to false")
    every = recipe.checkpoint.every_steps
    steps = _num_steps(plan, recipe)
    if steps % every or steps < 2 * every:
        raise BenchError(
            f"--steps is {steps}, checkpoint.every_steps {every}: measured is from the first save to the last; "
            f"choose a multiple of at least {2 * every}, or --set checkpoint.every_steps=N"
        )
    require_shards(one_stage(recipe, plan.stage, steps))


def _num_steps(plan: TrainPlan, recipe: Recipe) -> int:
    return 10 * recipe.checkpoint.every_steps if plan.steps is None else plan.steps


def _bench_batches(plan: TrainPlan, num_threads: int, report: ProgressReport, keep: Keep) -> None:
    rows: list[BatchRow] = []
    for batch_size in sorted(plan.batches):
        expected_s = rows[-1].step_s * batch_size / rows[-1].batch_size if rows else 0.0
        report.say(f"measuring a batch of {batch_size}" + (f", some {expected_s:.0f} s" if rows else ""))
        try:
            if expected_s > plan.limit_s:
                raise TimeLimitError(f"a step would take longer than {plan.limit_s:.0f} s")
            arguments = arguments_of(plan.shape(batch_size), num_steps=1)
            (answer,) = ask("batch", arguments, 1, num_threads, plan.limit_s)
        except TimeLimitError as error:
            report.say(f"batch {batch_size} is left out: {error}; raise --limit-s")
            continue
        rows.append(batch_row(batch_size, answer, rows[0] if rows else None))
        keep("batch", [asdict(row) for row in rows])
    report.say(
        f"One optimizer step of one rank, {plan.size} model, {plan.num_frames} frames, plain engine, micro-batches of "
        f"{plan.micro_batch_size}; the pixels of the batch lie on the host and are not counted"
    )
    shown = [
        (
            str(r.batch_size),
            f"{r.step_s:.4g}",
            f"{r.clips_per_s:.3g}",
            _mib(r.resident_bytes),
            _mib(r.peak_device_bytes),
            f"{r.growth:.2f}",
        )
        for r in rows
    ]
    _show(report, ("batch", "step s", "clips/s", "resident MiB", "peak MiB", "growth %"), shown)


def batch_row(batch_size: int, answer: dict[str, Any], first: BatchRow | None) -> BatchRow:
    """A row of a worker's answer."""
    (step_s,), peak = answer["step_s"], answer["peak_device_bytes"]
    growth = 100 * (peak / first.peak_device_bytes - 1) if first else 0.0
    return BatchRow(batch_size, step_s, batch_size / step_s, answer["resident_bytes"], peak, growth)


def _bench_passes(plan: TrainPlan, num_threads: int, report: ProgressReport, keep: Keep) -> None:
    sizes = plan.micro_batch_sizes
    report.say(f"measuring {plan.pass_batch} clips in one pass and in two, in turn")
    arguments = arguments_of(plan.shape(plan.pass_batch), micro_batch_sizes=sizes, rounds=plan.rounds)
    (samples,) = ask("passes", arguments, 1, num_threads, plan.limit_s)
    rows = pass_rows(sizes, samples)
    keep("passes", [asdict(row) for row in rows])
    shown = [
        (str(r.micro_batch_size), *_both(r.wall_s), *_both(r.cpu_s), _words(r.wall), _words(r.cpu))
        for r in rows
    ]
    names = ("micro-batch", "wall s", "spread", "CPU s", "spread", "wall x one pass", "CPU x one pass")
    report.say(
        f"One step over {plan.pass_batch} clips, {plan.size} model, {plan.num_frames} frames; aim: 1.35"
    )
    _show(report, names, shown)


def pass_rows(sizes: Sequence[int], samples: Sequence[Sequence[Sequence[float]]]) -> list[PassRow]:
    """Rows of a worker's samples, (wall, CPU) of every size; the first size is the whole batch."""
    times = [[list(values) for values in zip(*taken, strict=True)] for taken in samples]
    return [
        PassRow(
            size, Spread.of(wall), Spread.of(cpu), Ratio.of(wall, times[0][0]), Ratio.of(cpu, times[0][1])
        )
        for size, (wall, cpu) in zip(sizes, times, strict=True)
    ]


def _bench_engines(plan: TrainPlan, num_threads: int, report: ProgressReport, keep: Keep) -> None:
    samples: dict[str, list[Answers]] = {name: [] for name in plan.engines}
    shape, threads = plan.shape(plan.engine_batch // _RANKS), max(1, num_threads // _RANKS)
    rows: list[EngineRow] = []
    for number in range(1, plan.rounds + 1):
        for name in plan.engines:
            report.say(f"measuring {name}, round {number} of {plan.rounds}")
            arguments = arguments_of(shape, engine=ENGINES[name].model_dump(mode="json"), num_steps=2)
            samples[name].append(ask("engine", arguments, _RANKS, threads, plan.limit_s))
        rows = engine_rows(samples, plan.engine_batch)
        keep("engines", [asdict(row) for row in rows])
    report.say(
        f"{_RANKS} ranks, batch {plan.engine_batch}, micro-batches of {plan.micro_batch_size}, {plan.size} model, "
        f"{plan.num_frames} frames; memory of the rank that takes more"
    )
    shown = [
        (
            r.name,
            *_both(r.step_s),
            f"{r.clips_per_s:.3g}",
            _mib(r.peak_device_bytes),
            _mib(r.peak_host_bytes),
            _words(r.to_plain),
        )
        for r in rows
    ]
    _show(report, ("engine", "step s", "spread", "clips/s", "device MiB", "host MiB", "time x plain"), shown)


def engine_rows(samples: Mapping[str, Sequence[Answers]], batch_size: int) -> list[EngineRow]:
    """Rows of the ranks' answers of every round. A round's time is the mean of its steps, of the slower rank."""
    times = {
        name: [max(statistics.fmean(answer["step_s"]) for answer in answers) for answers in rounds]
        for name, rounds in samples.items()
    }

    def most(name: str, field: str) -> int:
        return max(answer[field] for answers in samples[name] for answer in answers)

    return [
        EngineRow(
            name=name,
            step_s=Spread.of(seconds),
            clips_per_s=batch_size / Spread.of(seconds).median,
            peak_device_bytes=most(name, "peak_device_bytes"),
            peak_host_bytes=most(name, "peak_host_bytes"),
            to_plain=Ratio.of(seconds, times[PLAIN]),
        )
        for name, seconds in times.items()
    ]


def _bench_overhead(plan: TrainPlan, recipe: Recipe, report: ProgressReport, keep: Keep) -> None:
    staged = one_stage(recipe, plan.stage, _num_steps(plan, recipe))
    report.say(f"measuring stage {plan.stage} of {recipe.name}, in the pipeline and in two loops, in turn")

    def kept(overhead: Overhead) -> None:
        keep(
            "overhead",
            {**asdict(overhead), "recipe": staged.model_dump(mode="json", exclude={"data", "workspace"})},
        )
        report.say(
            f"round {len(overhead.rounds)}: {overhead.over_bare.of_medians:.3f} times the bare steps so far"
        )

    for line in overhead_lines(measure_overhead(staged, plan.rounds, plan.limit_s, kept)):
        report.say(line)


def with_options(plan: TrainPlan, **options: Any) -> TrainPlan:
    """The plan with those options that were given, which None and empty ones were not."""
    return replace(plan, **{name: value for name, value in options.items() if value not in (None, ())})


def _show(report: ProgressReport, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(names[0])
    for name in names[1:]:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*row)
    print_table(report.console, shown)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.1f}"


def _both(spread: Spread) -> tuple[str, str]:
    return f"{spread.median:.4g}", f"{spread.least:.3g}-{spread.most:.3g} (n {spread.n})"


def _words(ratio: Ratio) -> str:
    return f"{ratio.of_medians:.3f} ({ratio.rounds.least:.3f}-{ratio.rounds.most:.3f})"
