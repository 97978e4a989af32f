"""Makes the tiny test videos and the fakes importable by the tests of the jobs, and records what is said."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from infra.runtime import prepare_process
from jobs.progress import ProgressReport

prepare_process()  # Ray reads its variables when it is imported
sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def report_lines() -> tuple[ProgressReport, Callable[[], list[str]]]:
    """A report that is no terminal, and the lines said so far."""
    output = io.StringIO()
    report = ProgressReport(Console(file=output, width=200, force_terminal=False))
    return report, lambda: output.getvalue().splitlines()
