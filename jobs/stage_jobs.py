"""The Ray jobs of a stage, one after the other until the ledger says that it is done.

Without MLflow, which takes 2 s to import: a command that drives a run submits the first of them itself.
"""

import logging
import sys
from collections.abc import Callable
from typing import Literal

from infra.ledger import Ledger
from infra.ray_jobs import ClusterError, Jobs
from infra.runtime import RANK_ENVIRONMENT
from jobs.run_dir import RunDir

logger = logging.getLogger(__name__)

Outcome = Literal["done", "stopped", "failed"]


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

    A job that ends otherwise is followed by another one, until this controller has seen `max_attempts` of them end.
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
            job_id = submit_attempt(jobs, run, ledger, number, address)
            say("stage %d: job %s", number, job_id)
        attempts_made += 1
        result = jobs.wait(job_id)
        keep_job_log(jobs, run, number, job_id)
        say("stage %d: job %s %s (exit code %s)", number, job_id, result.status, result.exit_code)


def submit_attempt(jobs: Jobs, run: RunDir, ledger: Ledger, number: int, address: str) -> str:
    """Submits the next job of a stage; returns its id."""
    attempt = ledger.read().stage(number).attempts + 1
    job_id = f"{run.run_id}-s{number}-a{attempt}"
    # Recorded first: who dies in between leaves an id unknown to Ray, and whoever follows goes on to the next.
    ledger.record_attempt(number, job_id)
    command = stage_command(run, number, attempt, address)
    jobs.submit_once(job_id, command, env_vars=RANK_ENVIRONMENT, metadata={"run": run.run_id})
    return job_id


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
