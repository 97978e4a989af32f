"""One recipe submitted by many commands at the same moment: one of them trains, the others follow."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import infra.ray_cluster
from infra.config_io import ConfigError
from infra.ledger import Ledger
from jobs import submit as module
from jobs.follow import POLL_S
from jobs.progress import ProgressReport
from jobs.recipe import Recipe, load_recipe, resolve_paths
from jobs.run_dir import RunDir
from jobs.stop import ask_to_stop

FORK = multiprocessing.get_context("fork")


def drive(cluster: object, run: RunDir, report: ProgressReport) -> int:
    """Stands for the controller: notes that it trains, and finishes the stages that are not done; the first one dies
    where it is told to, and is asked to stop before if it is told how many others must follow it by then.
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
            if (num_followers := (run.path / "die").read_text()) != "":
                while (run.path / "said").read_text().count("Following it here") < int(num_followers):
                    time.sleep(0.05)
                ask_to_stop(run, "user")
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
    with (run_dir / "said").open("a", buffering=1) as said:
        sys.exit(module.submit(run, None, ProgressReport(Console(file=said))))


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


def test_a_run_that_was_asked_to_stop_is_not_taken_over(recipe: Recipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "die").write_text("7")  # once so many follow, after a stop
    assert sorted(exit_codes(recipe, run_dir, 8)) == [-signal.SIGKILL, *[3] * 7]  # type: ignore[type-var]
    assert len((run_dir / "driven").read_text().split()) == 1


def test_a_stop_of_an_earlier_run_stops_none_of_many_submits(recipe: Recipe, tmp_path: Path) -> None:
    run = module.open_run(recipe, tmp_path / "run")
    Ledger(run.ledger_file).record_stage(1, "stopped", step=3)
    ask_to_stop(run, "user")
    assert exit_codes(recipe, run.path, 8) == [0] * 8
    assert len((run.path / "driven").read_text().split()) == 1


@pytest.mark.parametrize(
    ("statuses", "is_stop_asked", "is_new", "expected"),
    [
        (("done", "done"), True, False, 0),
        (("done", "running"), False, True, None),
        (("done", "running"), True, True, 3),
        (("done", "stopped"), False, True, 3),
        (("done", "stopped"), False, False, None),
        (("failed", "pending"), False, True, 1),
        (("failed", "pending"), False, False, None),
    ],
)
def test_how_a_run_ended_is_what_was_said_while_it_was_followed(
    statuses: tuple[str, str], is_stop_asked: bool, is_new: bool, expected: int | None,
    recipe: Recipe, tmp_path: Path,
) -> None:  # fmt: skip
    run = module.open_run(recipe, tmp_path / "run")
    ledger = Ledger(run.ledger_file)
    for number, status in enumerate(statuses, start=1):
        ledger.record_stage(number, status)  # type: ignore[arg-type]
    if is_stop_asked:
        ask_to_stop(run, "user")
    end = module.end_of(run, num_events=0 if is_new else 2)
    assert (end.shell_code if end else None) == expected


def create(recipe: Recipe, run_dir: Path, start: "multiprocessing.synchronize.Event") -> None:  # type: ignore[name-defined]
    start.wait()
    try:
        module.open_run(recipe, run_dir)
    except ConfigError:
        sys.exit(2)


def test_of_many_recipes_at_once_one_is_the_run(recipe: Recipe, tmp_path: Path) -> None:
    start = FORK.Event()
    recipes = [recipe.model_copy(update={"seed": seed}) for seed in range(20)]
    children = [FORK.Process(target=create, args=(one, tmp_path / "run", start)) for one in recipes]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join(60)
    (seed,) = [number for number, child in enumerate(children) if child.exitcode == 0]
    assert RunDir(tmp_path / "run").recipe().seed == seed
    assert not list((tmp_path / "run").glob("recipe-*.yaml"))
