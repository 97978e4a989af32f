"""What the records of all benchmarks share: spread of samples, the processor, a file known to be writable."""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from infra.runtime import provenance

# Wide enough for every column: a table that wraps cannot be read, and a log file does not mind.
_TABLE_WIDTH = 160


class BenchError(RuntimeError):
    """Settings that cannot be measured, or a measuring process that failed; the message carries its last words."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Samples of one quantity; the unit stands in the name of the field that holds it."""

    n: int
    median: float
    least: float
    most: float

    @staticmethod
    def of(samples: Sequence[float]) -> "Spread":
        return Spread(len(samples), statistics.median(samples), min(samples), max(samples))


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times a quantity is another, measured in turn: of the medians, and of each round."""

    of_medians: float
    rounds: Spread

    @staticmethod
    def of(over: Sequence[float], under: Sequence[float]) -> "Ratio":
        rounds = [a / b for a, b in zip(over, under, strict=True)]
        return Ratio(statistics.median(over) / statistics.median(under), Spread.of(rounds))


def require_writable(record_file: Path) -> None:
    """Raises BenchError before measuring, not after half an hour of it."""
    try:
        record_file.parent.mkdir(parents=True, exist_ok=True)
        with record_file.open("a"):
            pass
    except OSError as error:
        raise BenchError(
            f"the record cannot be written to {record_file}: {error}; choose another --record"
        ) from error


class Record:
    """A JSON file with where its figures come from and the parts measured so far, written again with each of them:
    what took minutes is not lost with what follows it. Raises BenchError where it cannot be written, before measuring.
    """

    def __init__(self, record_file: Path, version: int, num_threads: int, plan: Mapping[str, Any]) -> None:
        require_writable(record_file)
        self._file = record_file
        self.parts: dict[str, Any] = {
            "version": version,
            "provenance": provenance(),
            "processor": processor(),
            "num_threads": num_threads,
            "plan": plan,
        }

    def keep(self, part: str, value: Any) -> None:
        """Adds a part, or puts it in place of an earlier one."""
        self.parts[part] = value
        self._file.write_text(json.dumps(self.parts, indent=1) + "\n")


def print_table(console: Console, table: Table) -> None:
    """Prints every row on one line, whatever the width of the console, to which `print` would hold its own `width`."""
    before = console.width
    console.width = max(before, _TABLE_WIDTH)
    try:
        console.print(table, crop=False)
    finally:
        console.width = before


def processor() -> str:
    """Name, cores and vector instructions of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(sorted(names))}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
