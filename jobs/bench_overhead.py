"""What the pipeline costs around the training step, as measured by `svitt bench train`: a stage as `svitt submit` runs
it, in turn with the same steps in a bare loop.

Bare are the same number of ranks and threads, the same model, engine and step on batches read beforehand; no Ray,
loader, MLflow, journal or checkpoints. The window of both runs from the end of the first save to the end of the last,
so every save in it stands for `checkpoint.every_steps` steps and start-up is outside. Wall-clock time counts on idle
cores only: beside other work, the scheduler's shares decide it. Checkpoints go to the system's temporary folder: let
TMPDIR name one on the disk that counts.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.config_io import dump_yaml
from infra.journal import Record, valid_records
from infra.ledger import Ledger
from infra.runtime import environment
from jobs.bench_record import BenchError, Ratio, Spread
from jobs.bench_train_worker import TimeLimitError, ask
from jobs.recipe import Recipe
from jobs.run_dir import RunDir
from jobs.submit import open_run

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class PipelineRun:
    """Milliseconds of a step of a stage, from the end of its first save to that of its last.

    `busy_ms` is the step itself, `wait_ms` the wait for its batch, `save_ms` a step's share of the saves, `cpu_ms` the
    processor time of all processes that the command started. `start_s` runs from the command to the first report.
    """

    num_steps: int
    step_ms: float
    cpu_ms: float
    busy_ms: float
    wait_ms: float
    save_ms: float
    start_s: float

    @property
    def rest_ms(self) -> float:
        """Reporting, asking the other ranks, and what else the loop does between two steps."""
        return self.step_ms - self.busy_ms - self.wait_ms - self.save_ms


@dataclass(frozen=True, slots=True)
class BareRun:
    """The same of the bare loop: wall and processor milliseconds of a step, the latter over all ranks."""

    step_ms: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class Overhead:
    """Runs of both, in turn. `over` is the pipeline's time over the bare loop's, `cpu_over` the same of processor time,
    which other work on the machine disturbs less.
    """

    runs: tuple[PipelineRun, ...]
    bare: tuple[BareRun, ...]
    over: Ratio
    cpu_over: Ratio

    @staticmethod
    def of(runs: Sequence[PipelineRun], bare: Sequence[BareRun]) -> "Overhead":
        over = Ratio.of([run.step_ms for run in runs], [run.step_ms for run in bare])
        cpu_over = Ratio.of([run.cpu_ms for run in runs], [run.cpu_ms for run in bare])
        return Overhead(tuple(runs), tuple(bare), over, cpu_over)


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
    recipe: Recipe, rounds: int, limit_s: float, keep: Callable[[Overhead], None]
) -> Overhead:
    """`recipe` is that of `one_stage`; `limit_s` is for one run. `keep` is told the result after every round."""
    runs: list[PipelineRun] = []
    bare: list[BareRun] = []
    for _ in range(rounds):
        # A short name: the sockets of Ray lie below it, and a socket's path has at most 107 characters.
        with tempfile.TemporaryDirectory(prefix="b-", ignore_cleanup_errors=True) as folder:
            runs.append(run_pipeline(recipe, Path(folder), limit_s))
        with tempfile.TemporaryDirectory(prefix="b-") as folder:
            bare.append(run_bare(recipe, Path(folder), limit_s))
        keep(Overhead.of(runs, bare))
    return Overhead.of(runs, bare)


def run_pipeline(recipe: Recipe, folder: Path, limit_s: float) -> PipelineRun:
    """One run of a stage by `svitt submit`, with everything it writes in `folder`."""
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
    try:
        while process.poll() is None:
            if time.time() - began_s > limit_s:
                raise TimeLimitError(
                    f"the stage did not end within {limit_s:.0f} s; give fewer --steps or more --limit-s"
                )
            # The ledger tells of a save at once, the journal at its next report.
            saved = int(ledger.read().stage(1).facts.get("step", 0))
            if saved not in cpu_s:
                cpu_s[saved] = cpu_s_of_tree(process.pid)
            time.sleep(_POLL_S)
    finally:
        process.kill()  # its Ray ends with it
        process.wait()
    if process.returncode:
        raise BenchError(
            f"svitt submit ended with {process.returncode}:\n{log_file.read_text(errors='replace')[-2000:]}"
        )
    return pipeline_run(valid_records(run.journal(1)), began_s, cpu_s)


def cpu_s_of_tree(pid: int) -> float:
    """Processor seconds so far of a process and all below it that live: a local Ray with its workers and jobs too."""
    total = 0.0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def pipeline_run(records: list[Record], began_s: float, cpu_s: Mapping[int, float]) -> PipelineRun:
    """Figures of a finished stage from its journal; `began_s` is when its command was given, as seconds since 1970, and
    `cpu_s` the processor seconds spent when a save was seen.
    """
    saves = {record.step: record for record in records if "perf/save_s" in record.values}
    reports = [record for record in records if "perf/step_ms" in record.values]
    first, last = min(saves), max(saves)
    if not cpu_s.get(last, 0.0) > cpu_s.get(first, 0.0) > 0.0:
        raise BenchError(
            f"processor time could not be read at steps {first} and {last}: {cpu_s}; give more --steps, or "
            "--set checkpoint.every_steps=N with a larger N"
        )
    num_steps, busy_ms, wait_ms, before = last - first, 0.0, 0.0, first
    for report in reports:
        if report.step > first:
            waited_ms = report.values["perf/data_wait_ms"]
            wait_ms += waited_ms * (report.step - before)
            busy_ms += (report.values["perf/step_ms"] - waited_ms) * (report.step - before)
            before = report.step
    save_s = sum(record.values["perf/save_s"] for step, record in saves.items() if step > first)
    return PipelineRun(
        num_steps=num_steps,
        step_ms=(saves[last].time_ms - saves[first].time_ms) / num_steps,
        cpu_ms=1e3 * (cpu_s[last] - cpu_s[first]) / num_steps,
        busy_ms=busy_ms / num_steps,
        wait_ms=wait_ms / num_steps,
        save_ms=1e3 * save_s / num_steps,
        start_s=reports[0].time_ms / 1e3 - began_s,
    )


def run_bare(recipe: Recipe, folder: Path, limit_s: float) -> BareRun:
    """The same window without the pipeline."""
    run, cluster = open_run(recipe, folder / "run"), recipe.cluster
    num_steps, first_step = recipe.stages[0].num_steps, recipe.checkpoint.every_steps
    assert num_steps is not None, "one_stage sets it"
    arguments = {"run_dir": str(run.path), "first_step": first_step, "num_steps": num_steps}
    answers = ask("bare", arguments, cluster.num_workers, cluster.cpus_per_worker, limit_s)
    ms = 1e3 / (num_steps - first_step)
    wall_s = max(answer["wall_s"] for answer in answers)
    return BareRun(ms * wall_s, ms * sum(answer["cpu_s"] for answer in answers))


def overhead_lines(overhead: Overhead) -> list[str]:
    """The overhead in words: how much, where it goes, and what start-up takes."""
    runs, bare_ms = overhead.runs, [run.step_ms for run in overhead.bare]
    steps, starts = Spread.of([run.step_ms for run in runs]), Spread.of([run.start_s for run in runs])
    parts = {
        "the step itself takes longer": [r.busy_ms - bare for r, bare in zip(runs, bare_ms, strict=True)],
        "waiting for data": [run.wait_ms for run in runs],
        "saving": [run.save_ms for run in runs],
        "the rest": [run.rest_ms for run in runs],
    }
    split = [f"{name} {_range(Spread.of(values), '.2f')}" for name, values in parts.items()]
    return [
        f"a step takes {_range(steps, '.1f')} ms in the pipeline, {_range(Spread.of(bare_ms), '.1f')} ms bare: "
        f"{_percent(overhead.over)}; aims: 5 % at demo size, 2 % at small size",
        f"processor time of all processes over that of the bare ranks: {_percent(overhead.cpu_over)}",
        f"of it, in ms a step: {', '.join(split)}",
        f"from the command to the first report: {_range(starts, '.1f')} s",
    ]


def _percent(ratio: Ratio) -> str:
    middle, least, most = (100 * (r - 1) for r in (ratio.of_medians, ratio.rounds.least, ratio.rounds.most))
    return f"{middle:+.1f} % (by round {least:+.1f} to {most:+.1f} %, n {ratio.rounds.n})"


def _range(spread: Spread, digits: str) -> str:
    return f"{spread.median:{digits}} [{spread.least:{digits}}, {spread.most:{digits}}]"
