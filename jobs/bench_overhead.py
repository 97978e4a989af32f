"""What the pipeline costs around the training step, as measured by `svitt bench train`: a stage as `svitt submit` runs
it, in turn with the same steps in two loops without Ray, MLflow, journal and checkpoints.

Both loops have as many ranks and threads and the same model, engine and step; `reading` loads the stage's batches from
its shards, as any training has to, `bare` shows a few that were read beforehand. The three take turns of half a minute
(`bench_turns`): within minutes, a machine's speed drifts by more than is looked for. Every time is that in which the
processes themselves ran. A window lies between two saves, so that the saves in it stand for those of as many steps,
and start-up is outside. Checkpoints go to the system's temporary folder: let TMPDIR name one on the disk that counts.
"""

import contextlib
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.config_io import dump_yaml
from infra.journal import Record, valid_records
from infra.ledger import Ledger
from infra.runtime import environment
from jobs.bench_record import BenchError, Ratio, Spread
from jobs.bench_train_worker import Measuring, TimeLimitError, start, step_times
from jobs.bench_turns import Turns, cpu_s_of, leaving_at_sigterm
from jobs.recipe import Recipe
from jobs.run_dir import RunDir
from jobs.submit import open_run

_POLL_S = 0.1
# Long turns: what Ray does every few seconds of the clock it does at once when its turn comes, on top of the rest. Of
# 90 and 45 s they were no better: the machine drifts meanwhile, so that ratios of windows spread over 7 points.
_PIPELINE_TURN_S, _LOOP_TURN_S = 30.0, 15.0
_LEAST_WINDOW_S = 180.0  # of the clock: three turns of each
_FIRST_STEPS = 2  # of a loop: they warm it up


@dataclass(frozen=True, slots=True)
class PipelineWindow:
    """Milliseconds of a step from the end of a save, `since_s`, to that of a later one, `until_s` (seconds since 1970).

    `busy_ms` is the step itself, `wait_ms` the wait for its batch, `save_ms` a step's share of the saves, `cpu_ms` the
    processor time of all processes that the command started.
    """

    since_s: float
    until_s: float
    num_steps: int
    step_ms: float
    cpu_ms: float
    busy_ms: float
    wait_ms: float
    save_ms: float

    @property
    def rest_ms(self) -> float:
        """Reporting, asking the other ranks, and what else the loop does between two steps."""
        return self.step_ms - self.busy_ms - self.wait_ms - self.save_ms


@dataclass(frozen=True, slots=True)
class LoopWindow:
    """The same of a loop in the same minutes; `cpu_ms` is of all its ranks."""

    num_steps: int
    step_ms: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class Round:
    """What one start of all three gave; `start_s` runs from the command to its first report."""

    pipeline: tuple[PipelineWindow, ...]
    reading: tuple[LoopWindow, ...]
    bare: tuple[LoopWindow, ...]
    start_s: float


@dataclass(frozen=True, slots=True)
class Overhead:
    """Ratios are the pipeline's time over that of a loop, window by window; `cpu_over_*` those of processor time."""

    rounds: tuple[Round, ...]
    over_reading: Ratio
    over_bare: Ratio
    cpu_over_reading: Ratio
    cpu_over_bare: Ratio

    @staticmethod
    def of(rounds: Sequence[Round]) -> "Overhead":
        pipeline = [window for r in rounds for window in r.pipeline]
        reading = [window for r in rounds for window in r.reading]
        bare = [window for r in rounds for window in r.bare]
        step, cpu = [window.step_ms for window in pipeline], [window.cpu_ms for window in pipeline]
        return Overhead(
            tuple(rounds),
            over_reading=Ratio.of(step, [window.step_ms for window in reading]),
            over_bare=Ratio.of(step, [window.step_ms for window in bare]),
            cpu_over_reading=Ratio.of(cpu, [window.cpu_ms for window in reading]),
            cpu_over_bare=Ratio.of(cpu, [window.cpu_ms for window in bare]),
        )


def one_stage(recipe: Recipe, number: int, num_steps: int) -> Recipe:
    """Stage `number` of a recipe alone, from random weights, unscored, with an MLflow store beside its run."""
    stage = recipe.stages[number - 1]
    length = {"num_steps": num_steps, "num_epochs": None, "warmup_steps": min(stage.warmup_steps, num_steps)}
    changes = {
        "stages": (stage.model_copy(update=length),),
        "data": recipe.data.model_copy(update={"egomcq": None}),
        "cluster": recipe.cluster.model_copy(update={"address": None, "max_failures": 0}),
        "tracking": recipe.tracking.model_copy(update={"uri": None}),
    }
    return recipe.model_copy(update=changes)


def measure_overhead(
    recipe: Recipe, num_rounds: int, limit_s: float, keep: Callable[[Overhead], None]
) -> Overhead:
    """`recipe` is that of `one_stage`; `limit_s` is for one round. `keep` is told the result after every round."""
    rounds: list[Round] = []
    for _ in range(num_rounds):
        # A short name: the sockets of Ray lie below it, and a socket's path has at most 107 characters.
        with (
            leaving_at_sigterm(),
            tempfile.TemporaryDirectory(prefix="b-", ignore_cleanup_errors=True) as folder,
        ):
            rounds.append(measure_round(recipe, Path(folder), time.monotonic() + limit_s))
        keep(Overhead.of(rounds))
    return Overhead.of(rounds)


def measure_round(recipe: Recipe, folder: Path, until_s: float) -> Round:
    """One start of all three, with everything they write in `folder`. Raises TimeLimitError at `until_s` (monotonic)
    and BenchError where a process fails.
    """
    with contextlib.ExitStack() as stack:
        reading, bare = (
            stack.enter_context(running_loop(recipe, folder / name, name == "reading", until_s))
            for name in ("reading", "bare")
        )
        windows, start_s = run_pipeline(recipe, folder, (reading, bare), until_s)
        return Round(windows, tuple(map(reading.window, windows)), tuple(map(bare.window, windows)), start_s)


@dataclass(frozen=True)
class Loop:
    """Ranks that take steps without end, halted until it is their turn."""

    measuring: Measuring
    turns: Turns
    steps_dir: Path

    def window(self, during: PipelineWindow) -> LoopWindow:
        """Its steps in the minutes of a window. Raises BenchError where there are none."""
        ranks = step_times(self.steps_dir, len(self.turns.roots))
        first = [time_s for time_s, _ in ranks[0]]
        inside = [i for i, time_s in enumerate(first) if during.since_s <= time_s <= during.until_s]
        inside = [i for i in inside if all(i < len(rank) for rank in ranks)]
        if len(inside) < 2:
            raise BenchError(
                f"between two saves, {self.steps_dir.name} took {len(inside)} steps, which gives no time of a step; "
                "give more --steps"
            )
        since, until = inside[0], inside[-1]
        cpu_s = sum(rank[until][1] - rank[since][1] for rank in ranks)
        own_s, num_steps = self.turns.own_s(first[since], first[until]), until - since
        return LoopWindow(num_steps, 1e3 * own_s / num_steps, 1e3 * cpu_s / num_steps)


@contextlib.contextmanager
def running_loop(recipe: Recipe, folder: Path, is_reading: bool, until_s: float) -> Iterator[Loop]:
    """A loop that is warm and halted."""
    run, cluster = open_run(recipe, folder), recipe.cluster
    arguments = {"run_dir": str(run.path), "steps_dir": str(folder), "is_reading": is_reading}
    with start("loop", arguments, cluster.num_workers, cluster.cpus_per_worker) as measuring:
        while any(len(rank) < _FIRST_STEPS for rank in step_times(folder, cluster.num_workers)):
            measuring.check()
            if time.monotonic() > until_s:
                raise TimeLimitError(
                    f"{folder.name} took no {_FIRST_STEPS} steps in time; give more --limit-s"
                )
            time.sleep(_POLL_S)
        turns = Turns([rank.pid for rank in measuring.ranks])
        turns.halt()
        yield Loop(measuring, turns, folder)


def run_pipeline(
    recipe: Recipe, folder: Path, loops: Sequence[Loop], until_s: float
) -> tuple[tuple[PipelineWindow, ...], float]:
    """One run of a stage by `svitt submit`, from its first save on in turn with the loops: its windows, and seconds
    from the command to the first report.
    """
    recipe_file, run = folder / "recipe.yaml", RunDir(folder / "run")
    ledger = Ledger(run.ledger_file)
    recipe_file.write_text(dump_yaml(recipe))
    command = [sys.executable, "-m", "jobs", "submit", str(recipe_file), "--workspace", str(folder)]
    log_file, cpu_s = folder / "submit.log", dict[int, float]()
    began_s = time.time()
    with environment({"TMPDIR": str(folder)}), log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--run-dir", str(run.path)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).resolve().parent.parent,
        )
    pipeline = Turns([process.pid])

    def watch(seconds: float) -> None:
        """Notes the processor time when a save is seen."""
        end_s = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end_s:
            if time.monotonic() > until_s:
                raise TimeLimitError("the stage did not end in time; give fewer --steps or more --limit-s")
            # The ledger tells of a save at once, the journal at its next report.
            saved = int(ledger.read().stage(1).facts.get("step", 0))
            if saved not in cpu_s:
                cpu_s[saved] = cpu_s_of(pipeline.roots)
            time.sleep(_POLL_S)

    try:
        while process.poll() is None:
            pipeline.go()
            watch(_PIPELINE_TURN_S)
            if max(cpu_s, default=0) == 0:
                continue  # it starts with the machine to itself
            pipeline.halt()
            for loop in loops if process.poll() is None else ():
                loop.turns.go()
                time.sleep(_LOOP_TURN_S)
                loop.turns.halt()
                loop.measuring.check()
    finally:
        pipeline.go()
        process.kill()  # its Ray ends with it
        process.wait()
        pipeline.halt()
    if process.returncode:
        words = log_file.read_text(errors="replace")[-2000:]
        raise BenchError(f"svitt submit ended with {process.returncode}:\n{words}")
    records = valid_records(run.journal(1))
    first = next(record for record in records if "perf/step_ms" in record.values)
    return pipeline_windows(records, cpu_s, pipeline), first.time_ms / 1e3 - began_s


def pipeline_windows(
    records: Sequence[Record], cpu_s: Mapping[int, float], turns: Turns, least_s: float = _LEAST_WINDOW_S
) -> tuple[PipelineWindow, ...]:
    """Windows of a finished stage, of `least_s` by the clock if it is that long, from its journal and the processor
    seconds spent when a save was seen, by step. The parts of a step were measured by the clock, so what they took while
    others ran is taken off in proportion.
    """
    saves = [record for record in records if "perf/save_s" in record.values]
    # The last ones of a stage may come when its processes are gone, or two at once.
    seen = [save for save in saves if cpu_s.get(save.step, 0.0) > 0.0]
    edges = seen[:1]
    for save in seen[1:]:
        if cpu_s[save.step] > cpu_s[edges[-1].step] and save.time_ms - edges[-1].time_ms >= 1e3 * least_s:
            edges.append(save)
    if len(edges) == 1 and cpu_s[seen[-1].step] > cpu_s[seen[0].step]:
        edges.append(seen[-1])
    if len(edges) < 2:
        raise BenchError(
            f"no processor time could be read between the saves of {[save.step for save in saves]}: {dict(cpu_s)}; "
            "give more --steps, or --set checkpoint.every_steps=N with a larger N"
        )
    return tuple(_window(records, cpu_s, turns, *pair) for pair in itertools.pairwise(edges))


def _window(
    records: Sequence[Record], cpu_s: Mapping[int, float], turns: Turns, begin: Record, end: Record
) -> PipelineWindow:
    num_steps = end.step - begin.step
    clock_ms = (end.time_ms - begin.time_ms) / num_steps
    step_ms = 1e3 * turns.own_s(begin.time_ms / 1e3, end.time_ms / 1e3) / num_steps
    busy_ms, wait_ms, save_ms, before = 0.0, 0.0, 0.0, begin.step
    for record in records:
        if not begin.step < record.step <= end.step:
            continue
        save_ms += 1e3 * record.values.get("perf/save_s", 0.0)
        if "perf/step_ms" in record.values:
            waited_ms = record.values["perf/data_wait_ms"]
            wait_ms += waited_ms * (record.step - before)
            busy_ms += (record.values["perf/step_ms"] - waited_ms) * (record.step - before)
            before = record.step
    share = step_ms / clock_ms / num_steps
    return PipelineWindow(
        since_s=begin.time_ms / 1e3,
        until_s=end.time_ms / 1e3,
        num_steps=num_steps,
        step_ms=step_ms,
        cpu_ms=1e3 * (cpu_s[end.step] - cpu_s[begin.step]) / num_steps,
        busy_ms=share * busy_ms,
        wait_ms=share * wait_ms,
        save_ms=share * save_ms,
    )


def overhead_lines(overhead: Overhead) -> list[str]:
    """The overhead in words: how much, where it goes, and what start-up takes."""
    rounds = overhead.rounds
    pipeline = [window for r in rounds for window in r.pipeline]
    reading = [window.step_ms for r in rounds for window in r.reading]
    bare = [window.step_ms for r in rounds for window in r.bare]
    parts = {
        "the step itself takes longer": [w.busy_ms - ms for w, ms in zip(pipeline, bare, strict=True)],
        "waiting for data": [window.wait_ms for window in pipeline],
        "saving": [window.save_ms for window in pipeline],
        "the rest": [window.rest_ms for window in pipeline],
    }
    split = [f"{name} {_range(values, '.2f')}" for name, values in parts.items()]
    return [
        f"a step takes {_range([window.step_ms for window in pipeline], '.1f')} ms in the pipeline, "
        f"{_range(reading, '.1f')} in a loop that reads the shards, {_range(bare, '.1f')} bare",
        f"over the loop that reads: {_percent(overhead.over_reading)}, processor time "
        f"{_percent(overhead.cpu_over_reading)}; aims: 5 % at demo size, 2 % at small size",
        f"over the bare steps: {_percent(overhead.over_bare)}, processor time {_percent(overhead.cpu_over_bare)}",
        f"of it, in ms a step: {', '.join(split)}",
        f"from the command to the first report: {_range([r.start_s for r in rounds], '.1f')} s",
    ]


def _percent(ratio: Ratio) -> str:
    middle, least, most = (100 * (r - 1) for r in (ratio.of_medians, ratio.rounds.least, ratio.rounds.most))
    return f"{middle:+.1f} % ({least:+.1f} to {most:+.1f} %, n {ratio.rounds.n})"


def _range(values: Sequence[float], digits: str) -> str:
    spread = Spread.of(values)
    return f"{spread.median:{digits}} [{spread.least:{digits}}, {spread.most:{digits}}]"
