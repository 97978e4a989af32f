"""Who submits what and when: stages by the controller, the controller by `submit`."""

import io
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from fake_jobs import FakeJobs, state
from rich.console import Console
from small_runs import small_run

from infra.config_io import ConfigError
from infra.lease import Lease, LeaseHeldError
from infra.ledger import Ledger, RunState
from infra.ray_cluster import Cluster
from infra.ray_jobs import Jobs, JobState
from infra.runtime import RANK_ENVIRONMENT
from jobs.drift import find_drift, record_drift
from jobs.progress import ProgressReport
from jobs.recipe import Recipe, load_recipe, resolve_paths
from jobs.run_dir import RunDir
from jobs.stage_jobs import Outcome, run_stage_jobs
from jobs.submit import begin_stage, controller_id, drive, hand_over, open_run, put_aside, start_controller


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


@pytest.fixture
def ledger(run: RunDir) -> Ledger:
    return Ledger(run.ledger_file)


def ends(
    ledger: Ledger, *endings: tuple[str, int | None], number: int = 1
) -> Callable[[str], JobState | None]:
    """Jobs end one after the other as told; one that succeeds has marked its stage done."""
    waiting = list(endings)

    def look(job_id: str) -> JobState:
        status, exit_code = waiting.pop(0)
        if status == "SUCCEEDED":
            ledger.record_stage(number, "done")
        return state(job_id, status, exit_code)

    return look


def drive_stage(
    jobs: FakeJobs, run: RunDir, ledger: Ledger, number: int = 1, max_attempts: int = 3
) -> Outcome:
    return run_stage_jobs(cast(Jobs, jobs), run, ledger, number, max_attempts, say=lambda *values: None)


def test_a_new_stage_is_submitted_once_under_an_id_that_follows_from_the_run(
    run: RunDir, ledger: Ledger
) -> None:
    jobs = FakeJobs(on_look=ends(ledger, ("SUCCEEDED", 0)))
    assert drive_stage(jobs, run, ledger) == "done"
    job_id = f"{run.run_id}-s1-a1"
    assert jobs.submitted == jobs.waited == [job_id]
    assert jobs.env_vars[job_id] == RANK_ENVIRONMENT
    assert ledger.read().stage(1).job_ids == (job_id,)
    command = jobs.commands[job_id]
    assert command[:4] == [sys.executable, "-m", "jobs", "pretrain"]
    assert command[4:] == [str(run.path), "--stage", "1", "--attempt", "1", "--address", "auto"]


def test_the_run_id_is_the_same_for_the_same_folder_and_differs_for_another(tmp_path: Path) -> None:
    assert RunDir(tmp_path / "a" / "run").run_id == RunDir(tmp_path / "a" / "run").run_id
    assert RunDir(tmp_path / "a" / "run").run_id != RunDir(tmp_path / "b" / "run").run_id


def test_a_stage_that_is_done_is_not_submitted(run: RunDir, ledger: Ledger) -> None:
    ledger.record_stage(1, "done")
    jobs = FakeJobs()
    assert drive_stage(jobs, run, ledger) == "done"
    assert jobs.submitted == jobs.waited == []


def test_a_running_job_of_the_stage_is_attached_to(run: RunDir, ledger: Ledger) -> None:
    job_id = f"{run.run_id}-s1-a1"
    ledger.record_attempt(1, job_id)
    jobs = FakeJobs({job_id: state(job_id, "RUNNING")}, on_look=ends(ledger, ("SUCCEEDED", 0)))
    assert drive_stage(jobs, run, ledger) == "done"
    assert (jobs.submitted, jobs.waited) == ([], [job_id])
    assert ledger.read().stage(1).attempts == 1


def test_a_job_that_the_cluster_no_longer_knows_is_followed_by_the_next_attempt(
    run: RunDir, ledger: Ledger
) -> None:
    ledger.record_attempt(1, f"{run.run_id}-s1-a1")
    jobs = FakeJobs(on_look=ends(ledger, ("SUCCEEDED", 0)))
    assert drive_stage(jobs, run, ledger) == "done"
    assert jobs.submitted == [f"{run.run_id}-s1-a2"]
    assert ledger.read().stage(1).attempts == 2


def test_a_failed_job_is_followed_by_the_next_attempt(run: RunDir, ledger: Ledger) -> None:
    jobs = FakeJobs(on_look=ends(ledger, ("FAILED", 1), ("STOPPED", None), ("SUCCEEDED", 0)))
    assert drive_stage(jobs, run, ledger) == "done"
    assert jobs.submitted == [f"{run.run_id}-s1-a{attempt}" for attempt in (1, 2, 3)]


def test_attempts_end_with_the_budget_and_the_stage_is_failed(run: RunDir, ledger: Ledger) -> None:
    jobs = FakeJobs(on_look=ends(ledger, ("FAILED", 1), ("FAILED", 1)))
    assert drive_stage(jobs, run, ledger, max_attempts=2) == "failed"
    assert len(jobs.submitted) == 2
    assert ledger.read().stage(1).status == "failed"


def test_a_controller_started_later_has_its_own_budget_and_counts_on(run: RunDir, ledger: Ledger) -> None:
    drive_stage(FakeJobs(on_look=ends(ledger, ("FAILED", 1))), run, ledger, max_attempts=1)
    jobs = FakeJobs(on_look=ends(ledger, ("SUCCEEDED", 0)))
    assert drive_stage(jobs, run, ledger, max_attempts=1) == "done"
    assert jobs.submitted == [f"{run.run_id}-s1-a2"]


def test_a_job_that_succeeds_without_the_ledger_saying_done_counts_as_an_attempt(
    run: RunDir, ledger: Ledger
) -> None:
    jobs = FakeJobs(on_look=lambda job_id: state(job_id, "SUCCEEDED", 0))
    assert drive_stage(jobs, run, ledger, max_attempts=2) == "failed"
    assert ledger.read().stage(1).attempts == 2


def test_a_stage_done_by_a_job_that_then_fails_is_done(run: RunDir, ledger: Ledger) -> None:
    def look(job_id: str) -> JobState:
        ledger.record_stage(1, "done")
        return state(job_id, "FAILED", 1)

    jobs = FakeJobs(on_look=look)
    assert drive_stage(jobs, run, ledger) == "done"
    assert len(jobs.submitted) == 1


def test_a_stop_request_starts_no_job(run: RunDir, ledger: Ledger) -> None:
    run.stop_file.touch()
    jobs = FakeJobs()
    assert drive_stage(jobs, run, ledger) == "stopped"
    assert jobs.submitted == []
    assert ledger.read().stage(1).status == "stopped"


def test_a_stop_request_during_a_job_is_not_followed_by_another(run: RunDir, ledger: Ledger) -> None:
    def look(job_id: str) -> JobState:
        run.stop_file.touch()
        return state(job_id, "FAILED", 3)

    jobs = FakeJobs(on_look=look)
    assert drive_stage(jobs, run, ledger) == "stopped"
    assert len(jobs.submitted) == 1


def test_what_a_job_printed_is_kept_in_the_run_directory(run: RunDir, ledger: Ledger) -> None:
    drive_stage(FakeJobs(on_look=ends(ledger, ("SUCCEEDED", 0))), run, ledger)
    job_id = f"{run.run_id}-s1-a1"
    assert (run.stage_dir(1) / "logs" / f"{job_id}.log").read_text() == f"printed by {job_id}\n"


def test_a_log_that_cannot_be_had_does_not_stop_the_controller(run: RunDir, ledger: Ledger) -> None:
    jobs = FakeJobs(on_look=ends(ledger, ("SUCCEEDED", 0)), has_logs=False)
    assert drive_stage(jobs, run, ledger) == "done"
    (log,) = (run.stage_dir(1) / "logs").iterdir()
    assert "could not be read: gone" in log.read_text()


def cluster_of(jobs: FakeJobs, is_owned: bool = True) -> Cluster:
    return cast(Cluster, SimpleNamespace(address_inside="auto", jobs=jobs, is_owned=is_owned))


def test_the_first_controller_is_number_one_and_walks_the_run(run: RunDir, ledger: Ledger) -> None:
    jobs = FakeJobs()
    assert start_controller(cluster_of(jobs), run) == f"{run.run_id}-c1"
    command = jobs.commands[f"{run.run_id}-c1"]
    assert command == [sys.executable, "-m", "jobs", "control", str(run.path), "--address", "auto"]
    assert ledger.read().facts["controllers"] == 1


def test_a_controller_at_work_is_attached_to(run: RunDir, ledger: Ledger) -> None:
    jobs = FakeJobs()
    first = start_controller(cluster_of(jobs), run)
    jobs.states[first] = state(first, "RUNNING")
    assert start_controller(cluster_of(jobs), run) == first
    assert jobs.submitted == [first]
    assert ledger.read().facts["controllers"] == 1


def test_a_finished_controller_is_followed_by_the_next_number(run: RunDir, ledger: Ledger) -> None:
    jobs = FakeJobs()
    first = start_controller(cluster_of(jobs), run)
    jobs.states[first] = state(first, "FAILED", 1)
    assert start_controller(cluster_of(jobs), run) == f"{run.run_id}-c2"
    assert ledger.read().facts["controllers"] == 2


def test_a_controller_lost_with_its_cluster_is_followed_by_the_next_number(
    run: RunDir, ledger: Ledger
) -> None:
    start_controller(cluster_of(FakeJobs()), run)
    assert start_controller(cluster_of(FakeJobs()), run) == f"{run.run_id}-c2"


def test_a_caller_killed_before_it_wrote_the_ledger_leaves_a_controller_to_attach_to(run: RunDir) -> None:
    job_id = f"{run.run_id}-c1"
    jobs = FakeJobs({job_id: state(job_id, "RUNNING")})
    assert start_controller(cluster_of(jobs), run) == job_id
    assert jobs.submitted == []


def test_an_old_stop_request_does_not_stop_a_run_that_is_started_again(
    run: RunDir, recipe: Recipe, report_lines: tuple
) -> None:
    report, lines = report_lines
    opened = open_run(recipe, run.path)
    opened.stop_file.touch()
    assert hand_over(cluster_of(FakeJobs(), is_owned=False), opened, report) == 0
    assert not opened.stop_file.exists()
    assert f"submitted as job {opened.run_id}-c1; follow with: svitt status {opened.path}" in lines()


def test_a_stop_asked_of_a_controller_at_work_outlives_a_second_submit(
    run: RunDir, report_lines: tuple
) -> None:
    report, lines = report_lines
    jobs = FakeJobs()
    first = start_controller(cluster_of(jobs), run)
    jobs.states[first] = state(first, "RUNNING")
    run.stop_file.touch()
    assert hand_over(cluster_of(jobs, is_owned=False), run, report) == 0
    assert run.stop_file.exists()
    assert jobs.submitted == [first]
    assert lines() == [f"at work already, as job {first}; follow with: svitt status {run.path}"]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return resolve_paths(load_recipe("demo"), tmp_path / "workspace")


def test_a_run_directory_keeps_the_recipe_and_opens_again_with_the_same(
    recipe: Recipe, tmp_path: Path
) -> None:
    first = open_run(recipe, tmp_path / "runs" / "a")
    assert first.recipe() == recipe
    assert open_run(recipe, tmp_path / "runs" / "a") == first


def test_another_recipe_in_the_same_run_directory_is_refused_naming_what_differs(
    recipe: Recipe, tmp_path: Path
) -> None:
    open_run(recipe, tmp_path / "run")
    other = recipe.model_copy(update={"seed": 7, "log_every_steps": 3})
    with pytest.raises(ConfigError) as caught:
        open_run(other, tmp_path / "run")
    assert caught.value.problems[0] == "seed: the run has 0, the recipe now says 7"
    assert "--allow-drift" in caught.value.problems[1]
    assert RunDir(tmp_path / "run").recipe() == recipe


def test_a_change_that_is_allowed_is_told_kept_and_taken_over(recipe: Recipe, tmp_path: Path) -> None:
    run, said = open_run(recipe, tmp_path / "run"), []
    Ledger(run.ledger_file).record_start(1, 1)
    first = recipe.stages[0].model_copy(update={"learning_rate": 0.5})
    other = recipe.model_copy(update={"log_every_steps": 3, "stages": (first, *recipe.stages[1:])})
    open_run(other, run.path, say=said.append)
    rate = recipe.stages[0].learning_rate
    assert said == [
        "changed (free), log_every_steps: the run has 10, the recipe now says 3",
        f"changed (warned), stages.0.learning_rate: the run has {rate}, the recipe now says 0.5",
        f"the recipe of before is kept in {run.path / 'recipe-1.yaml'}",
    ]
    assert run.recipe() == other
    assert load_recipe(str(run.path / "recipe-1.yaml")) == recipe
    assert Ledger(run.ledger_file).read().facts["drift"] == [
        {"key": "log_every_steps", "old": "10", "new": "3", "class": "free"},
        {"key": "stages.0.learning_rate", "old": str(rate), "new": "0.5", "class": "warned"},
    ]


def test_what_is_refused_can_be_allowed(recipe: Recipe, tmp_path: Path) -> None:
    run = open_run(recipe, tmp_path / "run")
    open_run(recipe.model_copy(update={"seed": 7}), run.path, allow_drift=True)
    assert run.recipe().seed == 7
    assert Ledger(run.ledger_file).read().facts["drift"][0]["class"] == "refused"


def refusal(recipe: Recipe, run_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        open_run(recipe, run_dir)
    return str(caught.value)


def test_a_recipe_does_not_change_under_a_run_at_work(recipe: Recipe, tmp_path: Path) -> None:
    run = open_run(recipe, tmp_path / "run")
    other = recipe.model_copy(update={"log_every_steps": 3})
    with multiprocessing.get_context("fork").Pool(1) as pool, Lease(run.controller_lease):
        said = pool.apply(refusal, (other, run.path))
    assert "log_every_steps: the run has 10, the recipe now says 3" in said
    assert "does not change under a run at work" in said
    assert run.recipe() == recipe
    assert "drift" not in Ledger(run.ledger_file).read().facts


def test_a_change_told_by_a_command_that_was_killed_then_is_told_once(recipe: Recipe, tmp_path: Path) -> None:
    run = open_run(recipe, tmp_path / "run")
    for seed in (7, 7, 0, 7):
        old = recipe.model_copy(update={"seed": 7 - seed})
        new = recipe.model_copy(update={"seed": seed})
        record_drift(find_drift(old, new, RunState()), Ledger(run.ledger_file))
    entries = Ledger(run.ledger_file).read().facts["drift"]
    assert [(entry["old"], entry["new"]) for entry in entries] == [("0", "7"), ("7", "0"), ("0", "7")]


def test_a_fresh_start_takes_the_first_name_that_is_free(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run.old-2").mkdir()
    for kept in ("run.old-1", "run.old-3"):
        put_aside(open_run(recipe, tmp_path / "run").path, say=lambda line: None)
        assert (tmp_path / kept / "recipe.yaml").exists()
        assert not list((tmp_path / kept).glob("*.lease"))


def test_a_fresh_start_keeps_what_was_there(recipe: Recipe, tmp_path: Path) -> None:
    for number in (1, 2):
        run = open_run(recipe, tmp_path / "run")
        Ledger(run.ledger_file).record_stage(1, "done")
        put_aside(run.path, say=lambda line: None)
        assert not run.path.exists()
        assert Ledger(tmp_path / f"run.old-{number}" / "ledger.jsonl").read().stage(1).status == "done"
    put_aside(run.path, say=lambda line: None)


def test_a_run_at_work_is_not_put_aside(recipe: Recipe, tmp_path: Path) -> None:
    run = open_run(recipe, tmp_path / "run")
    with (
        multiprocessing.get_context("fork").Pool(1) as pool,
        Lease(run.driver_lease),
        pytest.raises(LeaseHeldError),
    ):
        pool.apply(put_aside, (run.path, print))
    assert run.recipe_file.exists()


def test_a_recipe_without_stages_is_no_run(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stages is empty"):
        open_run(recipe.model_copy(update={"stages": ()}), tmp_path / "run")


def test_a_folder_without_a_recipe_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml is missing"):
        RunDir(tmp_path).recipe()


def test_a_killed_controller_is_replaced_while_the_command_follows(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    ledger = Ledger(run.ledger_file)
    table = FakeJobs()

    def look(job_id: str) -> JobState | None:
        if job_id.endswith("-c1"):
            return state(job_id, "FAILED", exit_code=-9)
        for number in range(1, len(run.recipe().stages) + 1):
            ledger.record_stage(number, "done")
        return state(job_id, "SUCCEEDED", exit_code=0)

    table.on_look = look
    cluster = cast(Cluster, SimpleNamespace(address_inside="auto", jobs=table, is_owned=True))
    said = io.StringIO()
    code = drive(cluster, run, ProgressReport(Console(file=said)))
    assert code == 0
    assert table.submitted == [f"{run.run_id}-s1-a1", controller_id(run, 1), controller_id(run, 2)]
    assert "was killed" in said.getvalue()


def test_the_next_stage_begins_beside_the_controller_and_none_where_all_are_done(tmp_path: Path) -> None:
    run, table = small_run(tmp_path), FakeJobs()
    ledger = Ledger(run.ledger_file)
    ledger.record_stage(1, "done")
    begin_stage(cluster_of(table), run)
    assert table.submitted == [f"{run.run_id}-s2-a1"]
    ledger.record_stage(2, "done")
    begin_stage(cluster_of(table), run)
    assert table.submitted == [f"{run.run_id}-s2-a1"]


def test_a_stage_found_at_work_that_gives_up_is_not_tried_again(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    ledger, table = Ledger(run.ledger_file), FakeJobs()
    begin_stage(cluster_of(table), run)

    def look(job_id: str) -> JobState:
        ledger.record_stage(1, "failed", reason="its budgets are spent")
        return state(job_id, "FAILED", exit_code=1)

    table.on_look = look
    assert run_stage_jobs(cast(Jobs, table), run, ledger, 1, 3, say=lambda *values: None) == "failed"
    assert table.submitted == [f"{run.run_id}-s1-a1"]
