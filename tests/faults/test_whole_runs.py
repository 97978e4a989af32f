"""Whole runs under faults, in processes of their own; minutes each, so `make test-faults` runs them.

All have the same recipe and the same shards, and all have to end with the weights of the calm run.
"""

import signal
import time
from pathlib import Path

import pytest
from whole_runs import WholeRun, prepare_tiny

from jobs.goodput import goodput
from jobs.status import run_status
from jobs.summary import INTRA

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(1500)]

STEPS = 20
OVERRIDES = (
    f"stages.0.num_steps={STEPS}",
    f"stages.1.num_steps={STEPS}",
    "checkpoint.every_steps=4",
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    prepare_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def calm(workspace: Path) -> WholeRun:
    job = WholeRun(workspace, "calm", OVERRIDES)
    job.start()
    assert job.wait() == 0, job.tails()
    return job


def require_same(job: WholeRun, calm: WholeRun) -> None:
    """Every loss and the final weights are those of the calm run, bit for bit."""
    for stage in (1, 2):
        assert [step for step, _ in calm.losses(stage)] == list(range(1, STEPS + 1))
        assert job.losses(stage) == calm.losses(stage)
        assert job.weights_hash(stage) == calm.weights_hash(stage)


@pytest.fixture
def job(workspace: Path, request: pytest.FixtureRequest):
    name = request.node.name.removeprefix("test_").replace("[", "-").replace("]", "")
    found = WholeRun(workspace, f"{name[:24]}{name[-8:]}", OVERRIDES)
    yield found
    found.kill_everything()


def test_a_killed_worker_is_started_again_and_charged_once(job: WholeRun, calm: WholeRun) -> None:
    job.start()
    job.wait_until(lambda: job.step(1) >= 6)
    began_s = time.monotonic()
    job.kill_worker(1, 1)
    job.wait_until(lambda: len(job.state.stage(1).starts) == 2 and job.step(1) >= 4)
    print(f"from SIGKILL of a worker to the next step: {time.monotonic() - began_s:.1f} s")
    assert job.wait() == 0, job.tails()
    require_same(job, calm)
    assert job.state.stage(1).attempts == 1
    assert run_status(job.run).stages[0].faults["crashes"] == 1
    assert goodput(job.run).restart_s > 0


@pytest.mark.parametrize("verb", ["pretrain", "control"])
def test_a_killed_driver_or_controller_is_replaced(verb: str, job: WholeRun, calm: WholeRun) -> None:
    job.start()
    job.wait_until(lambda: job.step(2) >= 6)
    assert job.kill_job(verb)
    assert job.wait() == 0, job.tails()
    require_same(job, calm)
    assert job.state.facts["controllers"] == (2 if verb == "control" else 1)


def test_sigterm_to_the_stage_saves_and_stops_and_resume_goes_on(job: WholeRun, calm: WholeRun) -> None:
    job.start()
    job.wait_until(lambda: job.step(1) >= 6)
    began_s = time.monotonic()
    assert job.kill_job("pretrain", signal.SIGTERM)
    assert job.wait() == 3, job.tails()
    print(f"from SIGTERM of the stage to the end of the command: {time.monotonic() - began_s:.1f} s")
    state = job.state.stage(1)
    assert (state.status, state.starts[-1].ended) == ("stopped", "stopped")
    assert state.facts["step"] >= 6
    saved = state.facts["step"]
    job.start("resume")
    assert job.wait() == 0, job.tails()
    require_same(job, calm)
    assert f"continues from step {saved} of" in job.run.log_file(1, 2, 0).read_text()
    assert run_status(job.run).stages[0].faults["crashes"] == 0


def test_ctrl_c_saves_and_stops(job: WholeRun, calm: WholeRun) -> None:
    job.start()
    job.wait_until(lambda: job.step(2) >= 3)
    assert job.process is not None
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 3, job.tails()
    assert job.state.stage(2).status == "stopped"
    job.start("resume")
    assert job.wait() == 0, job.tails()
    require_same(job, calm)


def test_a_stopped_rank_ends_in_an_error_with_stacks_and_a_restart(workspace: Path, calm: WholeRun) -> None:
    job = WholeRun(workspace, "stopped-rank", (*OVERRIDES, "cluster.collective_timeout_s=12"))
    job.start()
    try:
        job.wait_until(lambda: job.step(1) >= 6)
        began_s = time.monotonic()
        job.kill_worker(1, 1, signal.SIGSTOP)
        job.wait_until(lambda: len(job.state.stage(1).starts) == 2 and job.step(1) >= 4)
        print(f"from SIGSTOP of a rank to the next step: {time.monotonic() - began_s:.1f} s, timeout 12 s")
        assert job.wait() == 0, job.tails()
        require_same(job, calm)
        stacks = job.run.log_file(1, 1, 0).with_suffix(".stacks").read_text()
        assert "rank 1 step" in stacks
        assert "(stopped)" in stacks
        assert "train_step" in stacks or "train_loop" in stacks
    finally:
        job.kill_everything()


def test_a_failed_evaluation_is_tried_again_alone_and_costs_no_training(
    job: WholeRun, calm: WholeRun
) -> None:
    questions = job.workspace / "shards" / "egomcq" / "index.parquet"
    aside = questions.with_name("aside")
    job.start()
    job.wait_until(lambda: job.step(1) >= 4)
    questions.rename(aside)
    try:
        assert job.wait() == 1, job.tails()
    finally:
        aside.rename(questions)
    state = job.state.stage(1)
    assert state.status == "failed"
    assert "2 crashes in a row at step" in state.facts["reason"]
    assert state.facts["step"] == STEPS
    job.start("resume")
    assert job.wait() == 0, job.tails()
    require_same(job, calm)
    assert f"{INTRA}_acc" in job.state.stage(1).facts["scores"]


def test_kills_inside_the_hand_over_start_no_stage_twice(job: WholeRun, calm: WholeRun) -> None:
    job.start()
    job.wait_until(lambda: job.state.stage(1).status in ("trained", "done"))
    job.kill_everything()
    assert job.state.stage(2).status == "pending"
    job.start()
    job.wait_until(lambda: job.state.stage(1).status == "done")
    job.kill_job("control")
    job.wait_until(lambda: job.state.stage(2).attempts == 1)
    job.kill_everything()
    job.start()
    assert job.wait() == 0, job.tails()
    require_same(job, calm)
    assert job.state.stage(1).facts["step"] == STEPS


def test_a_tracking_server_that_is_down_costs_nothing(workspace: Path, calm: WholeRun) -> None:
    job = WholeRun(workspace, "no-mlflow", (*OVERRIDES, "tracking.uri=http://127.0.0.1:9"))
    job.start()
    try:
        assert job.wait() == 0, job.tails()
        require_same(job, calm)
        assert "journal lines have not reached MLflow; once it answers, svitt rebuild" in job.log.read_text()
    finally:
        job.kill_everything()
