"""`svitt bench model`: time and memory of attention and video encoder on this machine, as a table and a record.

Figures count only against others of the same run: samples of all cases alternate, and every record carries commit,
versions, threads, number of samples, median and spread.
"""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from infra.runtime import environment, provenance
from jobs.bench_cases import ON_CPU, SDPA, SDPA_BIAS, Case, Setup, encoder_cases, flops, layer_cases
from jobs.bench_record import BenchError, Spread, print_table, processor, require_writable
from jobs.bench_worker import MEMORY_ENVIRONMENT, TIMING_ENVIRONMENT
from jobs.progress import ProgressReport

RECORD_VERSION = 2
_GROWTH_FRAMES = (4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Row:
    """One case measured. `peak_bytes` is what a step takes on top of weights, gradients and inputs; times, bytes and
    `flops` are those of all its clips.
    """

    level: str
    name: str
    num_frames: int
    wall_s: Spread
    cpu_s: Spread
    peak_bytes: int
    flops: float


@dataclass(frozen=True, slots=True)
class Growth:
    """Exponents p of quantity ~ frames^p, fitted to the frame counts named: 1 is linear."""

    level: str
    name: str
    frames: tuple[int, ...]
    time_exponent: float
    memory_exponent: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: frame counts of the table, frame counts of the growth fit, samples of each time, and parts of
    names that a case must hold one of (empty: all cases).
    """

    frames: tuple[int, ...] = (4, 8, 16)
    growth_frames: tuple[int, ...] = _GROWTH_FRAMES
    layer_samples: int = 9
    encoder_samples: int = 3
    encoder_growth: bool = True
    only: tuple[str, ...] = ()
    setup: Setup = ON_CPU

    def chosen(self, cases: Sequence[Case]) -> list[Case]:
        return [case for case in cases if not self.only or any(part in case.title for part in self.only)]

    @staticmethod
    def quick() -> "Plan":
        """Four frames, and attention alone for the growth: minutes."""
        return Plan((4,), (4, 8), layer_samples=5, encoder_samples=1, encoder_growth=False)


def bench_model(plan: Plan, num_threads: int, record_file: Path, report: ProgressReport) -> int:
    """Measures, prints the tables, writes the record. Raises BenchError for settings that cannot be measured, and
    when a measuring process fails.
    """
    _check(plan, num_threads, record_file)
    rows, rates, growth = [], [], []

    def write_record() -> None:
        """After every part: what was measured for minutes is not lost with what follows it."""
        record = {
            "version": RECORD_VERSION,
            "provenance": provenance(),
            "processor": processor(),
            "num_threads": num_threads,
            **plan.setup._asdict(),
            "matmul_flops_per_s": max(rates),
            "rows": [asdict(row) for row in rows],
            "growth": [asdict(fit) for fit in growth],
        }
        record_file.write_text(json.dumps(record, indent=1) + "\n")

    for num_frames in plan.frames:
        for cases, samples in (
            (plan.chosen(layer_cases(num_frames, plan.setup)), plan.layer_samples),
            (plan.chosen(encoder_cases(num_frames)), plan.encoder_samples),
        ):
            if not cases:
                continue
            measured, rate = _measure(cases, samples, num_threads, plan.setup, report)
            rows += measured
            rates.append(rate)
            write_record()
    if not rows:
        raise BenchError(f"no case has {' or '.join(map(repr, plan.only))} in its title; see --help")
    growth += _growth(plan, rows, num_threads, report)
    write_record()
    for level in ("layer", "encoder"):
        if of_level := [row for row in rows if row.level == level]:
            print_table(report.console, table(level, of_level, max(rates), plan.setup))
    for fit in growth:
        report.say(
            f"{fit.level} {fit.name}, {fit.frames[0]} to {fit.frames[-1]} frames: time grows with "
            f"frames^{fit.time_exponent:.2f}, memory with frames^{fit.memory_exponent:.2f}"
        )
    report.say(f"record: {record_file}")
    return 0


def _check(plan: Plan, num_threads: int, record_file: Path) -> None:
    """What would fail only after half an hour of measuring."""
    if num_threads < 1 or min(plan.frames, default=0) < 1:
        raise BenchError(f"threads is {num_threads} and frames are {plan.frames}; each has to be 1 or more")
    if plan.setup.num_clips < 1:
        raise BenchError(f"clips is {plan.setup.num_clips}; it has to be 1 or more")
    if plan.setup.device != "cpu" and not torch.cuda.is_available():
        raise BenchError(f"device is {plan.setup.device}, and torch finds no GPU here; leave --device out")
    require_writable(record_file)


def exponent(frames: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log(value) over log(frames) by least squares: p where value ~ frames^p."""
    x, y = [math.log(f) for f in frames], [math.log(v) for v in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def table(level: str, rows: Sequence[Row], matmul_flops_per_s: float, setup: Setup = ON_CPU) -> Table:
    """One level's rows: times, ratios to torch's attention of the same frames, memory, distance from the limit.

    Times compared are those of the CPU, which others on the machine disturb less, or the wall's for a GPU.
    """
    title = {"layer": "Attention of one layer (12 heads of 64)", "encoder": "Whole video encoder (ViT-B)"}[
        level
    ]
    clips = "1 clip" if setup.num_clips == 1 else f"{setup.num_clips} clips"
    shown = Table(title=f"{title}, forward + backward, {clips}, {setup.dtype}", title_justify="left")
    on_cpu = setup.device == "cpu"
    shown.add_column("T")
    shown.add_column("case")
    for name in (
        "wall s",
        "spread",
        "CPU s" if on_cpu else "clips/s",
        "x bias",
        "x no bias",
        "peak MiB",
        "x bias",
        "x no bias",
        "x limit",
    ):
        shown.add_column(name, justify="right")
    by_case = {(row.num_frames, row.name): row for row in rows}
    for row in rows:
        peers = [by_case.get((row.num_frames, name)) for name in (SDPA_BIAS, SDPA)]
        limit_s = row.flops / matmul_flops_per_s
        shown.add_row(
            str(row.num_frames),
            row.name,
            f"{row.wall_s.median:.4g}",
            f"{row.wall_s.least:.3g}-{row.wall_s.most:.3g} (n {row.wall_s.n})",
            f"{row.cpu_s.median if on_cpu else setup.num_clips / row.wall_s.median:.4g}",
            *(_ratio(row, peer, lambda r: (r.cpu_s if on_cpu else r.wall_s).median) for peer in peers),
            f"{row.peak_bytes / 2**20:.1f}",
            *(_ratio(row, peer, lambda r: r.peak_bytes) for peer in peers),
            f"{row.wall_s.median / limit_s:.2f}",
        )
    return shown


def _ratio(row: Row, peer: Row | None, value: Callable[[Row], float]) -> str:
    return "-" if peer is None else f"{value(row) / value(peer):.3f}"


def _measure(
    cases: Sequence[Case], num_samples: int, num_threads: int, setup: Setup, report: ProgressReport
) -> tuple[list[Row], float]:
    report.say(f"measuring {cases[0].level}, {cases[0].num_frames} frames: {len(cases)} cases")
    times = _ask("times", cases, num_samples, num_threads, setup, TIMING_ENVIRONMENT)
    rows = []
    for number, (case, samples) in enumerate(zip(cases, times["samples"], strict=True)):
        if setup.device == "cpu":
            # A process of its own: high-water marks of resident memory belong to a process.
            peak = _ask("memory", [case], 1, num_threads, setup, MEMORY_ENVIRONMENT)["peak_bytes"]
        else:
            peak = times["peak_bytes"][number]
        wall, cpu = (Spread.of(values) for values in zip(*samples, strict=True))
        rows.append(Row(*_names(case), wall, cpu, peak, flops(case) * setup.num_clips))
    return rows, times["matmul_flops_per_s"]


def _names(case: Case) -> tuple[str, str, int]:
    return case.level, case.name, case.num_frames


def _growth(plan: Plan, rows: Sequence[Row], num_threads: int, report: ProgressReport) -> list[Growth]:
    if not plan.growth_frames:
        return []
    known = {_names(Case(row.level, row.name, row.num_frames)): row for row in rows}
    fits = []
    kernel = plan.setup.kernel
    cases = (("layer", f"{kernel} (1,3,56)"), ("layer", f"{kernel} dense"), ("encoder", "both (1,3,56) 0.7"))
    for level, name in cases:
        if level == "encoder" and not plan.encoder_growth:
            continue
        points = []
        for num_frames in plan.growth_frames:
            case = Case(level, name, num_frames)
            samples = plan.layer_samples if level == "layer" else 1
            points.append(
                known.get(_names(case)) or _measure([case], samples, num_threads, plan.setup, report)[0][0]
            )
        on_cpu = plan.setup.device == "cpu"
        times = [(row.cpu_s if on_cpu else row.wall_s).median for row in points]
        peaks = [float(row.peak_bytes) for row in points]
        frames = plan.growth_frames
        fits.append(Growth(level, name, frames, exponent(frames, times), exponent(frames, peaks)))
    return fits


def _ask(
    measure: str,
    cases: Sequence[Case],
    num_samples: int,
    num_threads: int,
    setup: Setup,
    changes: dict[str, str],
) -> dict[str, Any]:
    request = {
        "measure": measure,
        "cases": cases,
        "num_samples": num_samples,
        "num_threads": num_threads,
        "setup": setup,
    }
    with environment({**changes, "OMP_NUM_THREADS": str(num_threads)}):
        done = subprocess.run(
            [sys.executable, "-m", "jobs.bench_worker", json.dumps(request)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
        )
    if done.returncode:
        names = ", ".join(case.name for case in cases)
        raise BenchError(
            f"measuring {measure} of {names} at {cases[0].num_frames} frames ended with {done.returncode} "
            f"(-9: out of memory):\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])
