"""The `pretrain` verb: one stage, placed on the cluster by Ray Train. This is what a stage job runs."""

import logging
import threading
from pathlib import Path
from typing import Any

from infra.ledger import Ledger
from infra.ray_cluster import open_cluster
from infra.ray_train import run_workers
from jobs.run_dir import RunDir
from jobs.stop import ask_to_stop, leaving_on_signals
from model.kernel_build import unavailable_reason

logger = logging.getLogger(__name__)

EXIT_CODES = {"done": 0, "failed": 1}


def run_stage(run_dir: Path, number: int, attempt: int, address: str | None) -> int:
    """Runs stage `number` (from 1) until it is scored, stopped or given up; 0 when it is done, 3 when it was stopped, 1
    when its budgets are spent.

    SIGTERM asks it to save and leave; the second one ends it at once. Raises TrainingError when the workers failed more
    often than Ray Train restarts them.
    """
    run = RunDir(run_dir.resolve())
    run.stage(number)
    recipe = run.recipe()
    cluster = recipe.cluster
    if not cluster.use_gpu:  # while the workers start: they would compile it with both their cores waiting
        threading.Thread(target=unavailable_reason, name="build-kernel", daemon=True).start()
    with (
        open_cluster(address, cluster.num_cpus),
        leaving_on_signals(lambda signal_name: ask_to_stop(run, "signal")),
    ):
        run_workers(
            _train,
            {"run_dir": str(run.path), "stage": number, "attempt": attempt, "use_gpu": cluster.use_gpu},
            num_workers=cluster.num_workers,
            # The attempt is part of the name, so that Ray Train never takes up bookkeeping of an earlier one:
            # what a stage continues from is our own checkpoint.
            name=f"{run.run_id}-s{number}-a{attempt}",
            storage_path=run.stage_dir(number) / "ray",
            # The workers themselves tell crashes from rollbacks and give up; Ray Train counts all the same.
            max_failures=cluster.max_failures + recipe.guard.max_rollbacks,
            use_gpu=cluster.use_gpu,
            cpus_per_worker=cluster.cpus_per_worker,
            collective_timeout_s=cluster.collective_timeout_s,
        )
    return EXIT_CODES.get(Ledger(run.ledger_file).read().stage(number).status, 3)


def _train(config: dict[str, Any]) -> None:
    """Imported by name in the job, by Ray Train's controlling actor and in the workers; only these need torch."""
    from jobs.pretrain import train_worker

    train_worker(config)
