"""The controller of a run: walks the stages, one Ray job each, and forwards the journals to MLflow.

It is a Ray job itself and keeps nothing in memory that the ledger does not hold, so it can be killed and started
again at any line. A stage counts as finished when the ledger says so, whatever became of its job.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from infra.lease import Lease
from infra.ledger import Ledger
from infra.ray_cluster import open_cluster
from infra.ray_jobs import ClusterError, Jobs
from jobs.run_dir import RunDir
from jobs.stop import ask_to_stop, leaving_on_signals
from jobs.tracking import RunTracking

logger = logging.getLogger(__name__)

Outcome = Literal["done", "stopped", "failed"]
EXIT_CODES: dict[Outcome, int] = {"done": 0, "stopped": 3, "failed": 1}


def run_controller(run_dir: Path, address: str) -> int:
    """Drives the run in `run_dir` to its end; 0 when all stages are done, 3 when stopped, 1 when a stage failed."""
    run = RunDir(run_dir.resolve())
    recipe = run.recipe()
    ledger = Ledger(run.ledger_file)
    with ExitStack() as stack:
        lease = stack.enter_context(Lease(run.controller_lease))
        cluster = stack.enter_context(open_cluster(address))
        # A stop of this job is a stop of the run: the stage saves and leaves, then this one does. After Ray has
        # started, which takes SIGTERM for itself.
        stack.enter_context(leaving_on_signals(lambda signal_name: ask_to_stop(run, "signal")))
        tracking = stack.enter_context(RunTracking(run, recipe, ledger))
        ledger.record_run(budget_from=ledger.read().generation)
        outcome: Outcome = "done"
        for number in range(1, len(recipe.stages) + 1):
            lease.require_held()
            tracking.follow_stage(number)
            outcome = run_stage_jobs(
                cluster.jobs, run, ledger, number, recipe.cluster.max_failures + 1, cluster.address_inside
            )
            tracking.finish_stage(number, outcome)
            if outcome != "done":
                break
        tracking.finish_run(outcome)
    logger.info("run %s: %s", run.run_id, outcome)
    return EXIT_CODES[outcome]


def run_stage_jobs(
    jobs: Jobs,
    run: RunDir,
    ledger: Ledger,
    number: int,
    max_attempts: int,
    address: str = "auto",
    say: Callable[..., None] = logger.info,
) -> Outcome:
    """Submits a stage until the ledger says it is done; attaches to a job of it that is still running.

    A job that ends otherwise is followed by another attempt, at most `max_attempts` by this controller.
    """
    attempts_made = 0
    while True:
        state = ledger.read().stage(number)
        if state.status == "done":
            return "done"
        if attempts_made and state.status == "failed":  # by the workers: their budgets are spent
            return "failed"
        if run.stop_file.exists():
            ledger.record_stage(number, "stopped")
            return "stopped"
        job_id = state.job_ids[-1] if state.job_ids else None
        known = jobs.find(job_id) if job_id else None
        if job_id is None or known is None or known.is_finished:
            if attempts_made == max_attempts:
                ledger.record_stage(
                    number, "failed", reason=f"{attempts_made} jobs of this stage ended without it"
                )
                return "failed"
            attempt = state.attempts + 1
            job_id = f"{run.run_id}-s{number}-a{attempt}"
            # Recorded first: a controller that dies in between finds the id unknown to Ray and goes on to the next.
            ledger.record_attempt(number, job_id)
            jobs.submit_once(
                job_id, stage_command(run, number, attempt, address), metadata={"run": run.run_id}
            )
            attempts_made += 1
            say("stage %d: job %s", number, job_id)
        result = jobs.wait(job_id)
        keep_job_log(jobs, run, number, job_id)
        say("stage %d: job %s %s (exit code %s)", number, job_id, result.status, result.exit_code)


def keep_job_log(jobs: Jobs, run: RunDir, number: int, job_id: str) -> None:
    """Copies what a stage job printed into the run directory: Ray's own copy goes with its session."""
    path = run.stage_dir(number) / "logs" / f"{job_id}.log"
    try:
        text = jobs.logs(job_id)
    except ClusterError as error:
        text = f"the log of job {job_id} could not be read: {error}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def stage_command(run: RunDir, number: int, attempt: int, address: str) -> list[str]:
    """What a stage job runs, inside the cluster at `address`."""
    options = ["--stage", str(number), "--attempt", str(attempt), "--address", address]
    return [sys.executable, "-m", "jobs", "pretrain", str(run.path), *options]
