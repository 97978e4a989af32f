"""One recipe submitted by many commands at the same moment: one of them trains, the others follow."""

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))

import infra.ray_cluster
from infra.ledger import Ledger
from jobs import submit as module
from jobs.follow import POLL_S
from jobs.progress import ProgressReport
from jobs.recipe import Recipe, load_recipe, resolve_paths
from jobs.run_dir import RunDir

FORK = multiprocessing.get_context("fork")


def drive(cluster: object, run: RunDir, report: ProgressReport, is_detached: bool = False) -> int:
    """Stands for the controller: notes that it trains, and finishes the stages that are not done; the first one dies
    where it is told to.
    """
    ledger = Ledger(run.ledger_file)
    missing = [number for number in (1, 2) if ledger.read().stage(number).status != "done"]
    if missing:
        with (run.path / "driven").open("a") as file:
            file.write(f"{os.getpid()}\n")
    for number in missing:
        ledger.record_attempt(number, f"job-{number}")
        time.sleep(0.3)
        if number == 2 and (run.path / "die").exists():
            (run.path / "die").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        ledger.record_stage(number, "done", scores={})
    return 0


def submit(recipe: Recipe, run_dir: Path, start: "multiprocessing.synchronize.Event") -> None:  # type: ignore[name-defined]
    """What `svitt submit` does once the recipe is read, without Ray."""
    module.drive = drive  # type: ignore[assignment]
    infra.ray_cluster.open_cluster = lambda *arguments: contextlib.nullcontext()  # type: ignore[assignment]
    start.wait()
    run = module.open_run(recipe, run_dir)
    sys.exit(module.submit(run, None, ProgressReport(Console(file=io.StringIO()))))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return resolve_paths(load_recipe("demo"), tmp_path)


def exit_codes(recipe: Recipe, run_dir: Path, number: int) -> list[int | None]:
    start = FORK.Event()
    children = [FORK.Process(target=submit, args=(recipe, run_dir, start)) for _ in range(number)]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join(60 + 20 * POLL_S)
        assert not child.is_alive()
    return [child.exitcode for child in children]


def test_fifty_submits_at_once_are_one_training(recipe: Recipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert exit_codes(recipe, run_dir, 50) == [0] * 50
    assert len((run_dir / "driven").read_text().split()) == 1
    assert RunDir(run_dir).recipe() == recipe


def test_when_the_one_that_trains_dies_exactly_one_takes_over(recipe: Recipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "die").touch()
    assert sorted(exit_codes(recipe, run_dir, 8)) == [-signal.SIGKILL, *[0] * 7]  # type: ignore[type-var]
    assert len((run_dir / "driven").read_text().split()) == 2
