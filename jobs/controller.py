"""The controller of a run: walks the stages, one Ray job each, and forwards the journals to MLflow.

It is a Ray job itself and keeps nothing in memory that the ledger does not hold, so it can be killed and started
again at any line. A stage counts as finished when the ledger says so, whatever became of its job.
"""

import logging
from contextlib import ExitStack
from pathlib import Path

from infra.lease import Lease
from infra.ledger import Ledger
from infra.ray_cluster import open_cluster
from jobs.run_dir import RunDir
from jobs.stage_jobs import Outcome, run_stage_jobs
from jobs.stop import ask_to_stop, leaving_on_signals
from jobs.tracking import RunTracking

logger = logging.getLogger(__name__)

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
