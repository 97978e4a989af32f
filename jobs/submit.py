"""`submit` and `resume`: start the controller job of a run, or attach to it, and follow it."""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from infra.config_io import ConfigError, dump_yaml
from infra.durable import write_durably
from infra.lease import Lease, LeaseHeldError
from infra.ledger import Ledger
from infra.ray_jobs import JobState
from jobs.drift import find_drift, record_drift, require_allowed
from jobs.follow import follow_run
from jobs.goodput import goodput
from jobs.progress import ProgressReport
from jobs.recipe import Recipe
from jobs.run_dir import RunDir
from jobs.stage_jobs import submit_attempt
from jobs.stop import ask_to_stop, leaving_on_signals
from jobs.summary import num_unsent
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
    with FileLock(f"{run.recipe_file}.lock"):  # of two recipes at the same moment one is the run's
        if not run.recipe_file.exists():
            write_durably(run.recipe_file, dump_yaml(recipe))
            return run
    take_over(recipe, run, allow_drift, say)
    return run


def take_over(recipe: Recipe, run: RunDir, allow_drift: bool, say: Say) -> None:
    """Makes a changed recipe that of a run. Raises ConfigError naming what may not differ, or what does while the run
    is driven: of its ranks some would read the old recipe and some the new.
    """
    ledger = Ledger(run.ledger_file)
    found = find_drift(run.recipe(), recipe, ledger.read())
    if not found:
        return
    require_allowed(found, run, allow_drift)
    try:
        with undriven(run):
            aside = first_free(run.path, "recipe-{}.yaml")
            write_durably(aside, run.recipe_file.read_text())
            record_drift(found, ledger)
            write_durably(run.recipe_file, dump_yaml(recipe))
    except LeaseHeldError as error:
        raise ConfigError(
            str(run.path), [*map(str, found), f"a recipe does not change under a run at work: {error}"]
        ) from error
    for drift in found:
        say(f"changed ({drift.kind}), {drift}")
    say(f"the recipe of before is kept in {aside}")


def put_aside(run_dir: Path, say: Say) -> None:
    """Moves a run directory out of the way of a fresh start. Raises LeaseHeldError while the run is driven."""
    run = RunDir(run_dir.resolve())
    if not run.path.exists():
        return
    with undriven(run):
        aside = first_free(run.path.parent, f"{run.path.name}.old-{{}}")
        os.rename(run.path, aside)
    for lease in (run.driver_lease, run.controller_lease):  # moved while they were held
        (aside / lease.name).unlink(missing_ok=True)
    say(f"the run of before is kept in {aside}")


@contextlib.contextmanager
def undriven(run: RunDir) -> Iterator[None]:
    """Keeps everybody from driving the run. Raises LeaseHeldError while somebody does."""
    with Lease(run.driver_lease), Lease(run.controller_lease):
        yield


def first_free(folder: Path, pattern: str) -> Path:
    """The first path of a numbered pattern, from 1, that is not there."""
    paths = (folder / pattern.format(number) for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


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


def hand_over(cluster: "Cluster", run: RunDir, report: ProgressReport) -> int:
    """Starts the run's controller on somebody else's cluster, or finds the one at work there, and leaves it alone."""
    job_id = controller_at_work(cluster, run)
    if job_id is not None:
        report.say(f"at work already, as job {job_id}; follow with: svitt status {run.path}")
        return 0
    run.stop_file.unlink(missing_ok=True)  # asked of an earlier controller, and over with it
    renew_budgets(run)
    job_id = start_controller(cluster, run)
    report.say(f"submitted as job {job_id}; follow with: svitt status {run.path}")
    return 0


def drive(cluster: "Cluster", run: RunDir, report: ProgressReport) -> int:
    """Starts the run's controller on this command's own cluster and follows it to the end; the run's lease is held.

    The first Ctrl-C or SIGTERM asks the run to save and leave, the second leaves at once. Returns the controller's exit
    code: 0 all stages done, 3 stopped, 1 failed.
    """
    renew_budgets(run)
    begin_stage(cluster, run)
    job_id = start_controller(cluster, run)

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
    if unsent := num_unsent(Ledger(run.ledger_file).read()):
        report.say(
            f"{unsent} journal lines have not reached MLflow; once it answers, svitt rebuild {run.path} sends them"
        )
    return code


def renew_budgets(run: RunDir) -> None:
    """Faults from before this command no longer count: whoever starts a run again has looked at them."""
    ledger = Ledger(run.ledger_file)
    ledger.record_run(budget_from=ledger.read().generation)


def begin_stage(cluster: "Cluster", run: RunDir) -> None:
    """Submits the job of the stage that is next, for the controller to find: the processes of both come up side by
    side, which saves 4 s. Only who holds the run's lease, on a cluster of its own, where no earlier job can be at work.
    """
    ledger = Ledger(run.ledger_file)
    state = ledger.read()
    number = next(
        (n for n in range(1, len(run.recipe().stages) + 1) if state.stage(n).status != "done"), None
    )
    if number is not None:
        submit_attempt(cluster.jobs, run, ledger, number, cluster.address_inside)


def start_controller(cluster: "Cluster", run: RunDir) -> str:
    """Submission id of the run's controller. Two callers at once get the same one: the id is the lock."""
    if (at_work := controller_at_work(cluster, run)) is not None:
        return at_work
    ledger = Ledger(run.ledger_file)
    number = int(ledger.read().facts.get("controllers", 0))
    job_id = controller_id(run, number + 1)
    python = sys.executable if cluster.is_owned else "python"
    command = [python, "-m", "jobs", "control", str(run.path), "--address", cluster.address_inside]
    cluster.jobs.submit_once(job_id, command, metadata={"run": run.run_id})
    ledger.record_run(controllers=number + 1)
    return job_id


def controller_at_work(cluster: "Cluster", run: RunDir) -> str | None:
    """Submission id of the run's newest controller if the cluster knows it and it has not ended."""
    number = int(Ledger(run.ledger_file).read().facts.get("controllers", 0))
    known = cluster.jobs.find(controller_id(run, number)) if number else None
    return None if known is None or known.is_finished else known.submission_id


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
            return hand_over(cluster, run, report)
    lease = Lease(run.driver_lease)
    num_events = Ledger(run.ledger_file).read().num_events
    try:
        lease.acquire()
        run.stop_file.unlink(missing_ok=True)  # asked of an earlier command, and over with it
    except LeaseHeldError as error:
        report.say(f"{error}. Following it here")
        code = follow_run(partial(look_from_beside, run, lease, num_events), run, report)
        if code != TAKEN_OVER:
            return code
        report.say("what drove the run has died; it is taken over here")
    try:
        from infra.ray_cluster import open_cluster

        with open_cluster(None, recipe.cluster.num_cpus) as cluster:
            return drive(cluster, run, report)
    finally:
        lease.release()


def look_from_beside(run: RunDir, lease: Lease, num_events: int) -> JobState:
    """How a run fares that another command drives. Once that one has ended, the lease is taken where the run has not
    come to an end, and given back where it has.

    `num_events`: of the ledger when this command began; an end from before that is not the one waited for.
    """
    try:
        lease.acquire()
    except LeaseHeldError:
        return JobState(run.run_id, "RUNNING", "", None)
    end = end_of(run, num_events)
    if end is None:
        return JobState(run.run_id, "FAILED", "it died", TAKEN_OVER)
    lease.release()
    return end


def end_of(run: RunDir, num_events: int) -> JobState | None:
    """How a run ended that nobody drives; None where it goes on with the next one who does."""
    state = Ledger(run.ledger_file).read()
    stages = [state.stage(number).status for number in range(1, len(run.recipe().stages) + 1)]
    if all(status == "done" for status in stages):
        return JobState(run.run_id, "SUCCEEDED", "", 0)
    if state.num_events > num_events and "failed" in stages:
        return JobState(run.run_id, "FAILED", "failed", 1)
    if run.stop_file.exists() or (state.num_events > num_events and "stopped" in stages):
        return JobState(run.run_id, "FAILED", "it ended after a stop was asked for", 3)
    return None
