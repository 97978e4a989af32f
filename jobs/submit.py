"""`submit` and `resume`: start the controller job of a run, or attach to it, and follow it."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from infra.checkpoint import write_durably
from infra.config_io import ConfigError, dump_yaml
from infra.lease import Lease, LeaseHeldError
from infra.ledger import Ledger
from infra.ray_jobs import JobState
from jobs.drift import find_drift, record_drift, require_allowed
from jobs.follow import follow_run
from jobs.goodput import goodput
from jobs.progress import ProgressReport
from jobs.recipe import Recipe
from jobs.run_dir import RunDir
from jobs.stop import ask_to_stop, leaving_on_signals
from pipeline.manifest import read_manifest, require_tags, require_whole
from pipeline.storage import storage_path

if TYPE_CHECKING:  # those who only follow a run need no Ray
    from infra.ray_cluster import Cluster

Say = Callable[[str], None]
# Exit code, inside of this module, of following a run whose driver died.
TAKEN_OVER = 75
# Controllers started by one command when they are killed one after the other.
MAX_CONTROLLERS = 4


def open_run(
    recipe: Recipe, run_dir: Path, allow_drift: bool = False, say: Say = lambda line: None
) -> RunDir:
    """The run directory of a resolved recipe, created at the first submission.

    What differs from the recipe that the run has is told, kept in the ledger, and taken over. Raises ConfigError naming
    what may not differ.
    """
    if not recipe.stages:
        raise ConfigError(recipe.name, ["stages is empty: a run needs at least one stage"])
    run = RunDir(run_dir.resolve())
    run.path.mkdir(parents=True, exist_ok=True)
    if not run.recipe_file.exists():
        write_durably(run.recipe_file, dump_yaml(recipe))
        return run
    take_over(recipe, run, allow_drift, say)
    return run


def take_over(recipe: Recipe, run: RunDir, allow_drift: bool, say: Say) -> None:
    """Makes a changed recipe that of a run. Raises ConfigError naming what may not differ."""
    ledger = Ledger(run.ledger_file)
    found = find_drift(run.recipe(), recipe, ledger.read())
    if not found:
        return
    require_allowed(found, run, allow_drift)
    for drift in found:
        if drift.kind != "free":
            say(f"changed, {drift}")
    record_drift(found, ledger)
    number = len(list(run.path.glob("recipe-*.yaml"))) + 1
    write_durably(run.path / f"recipe-{number}.yaml", run.recipe_file.read_text())
    write_durably(run.recipe_file, dump_yaml(recipe))


def put_aside(run_dir: Path, say: Say) -> None:
    """Moves a run directory out of the way of a fresh start. Raises LeaseHeldError while the run is driven."""
    run = RunDir(run_dir.resolve())
    if not run.path.exists():
        return
    with Lease(run.driver_lease), Lease(run.controller_lease):
        number = len(list(run.path.parent.glob(f"{run.path.name}.old-*"))) + 1
        aside = run.path.with_name(f"{run.path.name}.old-{number}")
    os.rename(run.path, aside)
    say(f"the run of before is kept in {aside}")


def require_shards(recipe: Recipe) -> None:
    """Raises DataError when the recipe's data is not prepared, not whole, or lacks what the loss needs, before anything
    is started for it.
    """
    for name in ("train", "egomcq") if recipe.data.egomcq else ("train",):
        shards_dir = storage_path(recipe.data.shards) / name
        manifest = read_manifest(shards_dir)
        require_whole(shards_dir, manifest, is_full=False)
        if name == "train" and recipe.model.vtc_positives == "action":
            require_tags(manifest)


def drive(cluster: "Cluster", run: RunDir, report: ProgressReport, is_detached: bool = False) -> int:
    """Starts the run's controller on the cluster, or attaches to the one at work, and follows it to the end.

    The first Ctrl-C or SIGTERM asks the run to save and leave, the second leaves at once. Returns the controller's exit
    code: 0 all stages done, 3 stopped, 1 failed. Detached: returns 0 at once.
    """
    run.stop_file.unlink(missing_ok=True)
    job_id = start_controller(cluster, run)
    if is_detached:
        report.say(f"submitted as job {job_id}; follow with: svitt status {run.path}")
        return 0

    def stop(signal_name: str) -> None:
        ask_to_stop(run, "signal")
        report.say(f"{signal_name}: the run saves before its next step and leaves; once more leaves at once")

    code = 1
    with leaving_on_signals(stop):
        for _ in range(MAX_CONTROLLERS):
            code = follow_run(partial(cluster.jobs.status, job_id), run, report)
            if not cluster.jobs.status(job_id).was_killed:
                break
            report.say(
                f"the controller job {job_id} was killed; the next one takes the run up from its ledger"
            )
            job_id = start_controller(cluster, run)
    report.say(goodput(run).line())
    return code


def start_controller(cluster: "Cluster", run: RunDir) -> str:
    """Submission id of the run's controller. Two callers at once get the same one: the id is the lock."""
    ledger = Ledger(run.ledger_file)
    number = int(ledger.read().facts.get("controllers", 0))
    if number:
        known = cluster.jobs.find(controller_id(run, number))
        if known is not None and not known.is_finished:
            return known.submission_id
    job_id = controller_id(run, number + 1)
    python = sys.executable if cluster.is_owned else "python"
    command = [python, "-m", "jobs", "control", str(run.path), "--address", cluster.address_inside]
    cluster.jobs.submit_once(job_id, command, metadata={"run": run.run_id})
    ledger.record_run(controllers=number + 1)
    return job_id


def controller_id(run: RunDir, number: int) -> str:
    """The id of the n-th controller job of a run."""
    return f"{run.run_id}-c{number}"


def submit(run: RunDir, address: str | None, report: ProgressReport) -> int:
    """Trains the stages of a run: on a local Ray until they are done, or detached on a cluster at `address`.

    Where another command drives the run on its own Ray already, this one follows it, and takes over when that one dies.
    """
    recipe = run.recipe()
    address = address or recipe.cluster.address
    if address is not None:
        from infra.ray_cluster import open_cluster

        with open_cluster(address, recipe.cluster.num_cpus) as cluster:
            return drive(cluster, run, report, is_detached=not cluster.is_owned)
    lease = Lease(run.driver_lease)
    try:
        lease.acquire()
    except LeaseHeldError as error:
        report.say(f"{error}. Following it here")
        code = follow_run(partial(look_from_beside, run, lease), run, report)
        if code != TAKEN_OVER:
            return code
        report.say("what drove the run has died; it is taken over here")
    try:
        from infra.ray_cluster import open_cluster

        with open_cluster(None, recipe.cluster.num_cpus) as cluster:
            return drive(cluster, run, report)
    finally:
        lease.release()


def look_from_beside(run: RunDir, lease: Lease) -> JobState:
    """How a run fares that another command drives. Once that one has ended the lease is taken; it is given back where
    there is nothing left to do.
    """
    try:
        lease.acquire()
    except LeaseHeldError:
        return JobState(run.run_id, "RUNNING", "", None)
    state = Ledger(run.ledger_file).read()
    stages = [state.stage(number).status for number in range(1, len(run.recipe().stages) + 1)]
    for status, code in (("failed", 1), ("stopped", 3)):
        if status in stages:
            lease.release()
            return JobState(run.run_id, "FAILED", status, code)
    if all(status == "done" for status in stages):
        lease.release()
        return JobState(run.run_id, "SUCCEEDED", "", 0)
    return JobState(run.run_id, "FAILED", "it died", TAKEN_OVER)
