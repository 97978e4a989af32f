"""`submit` and `resume`: start the controller job of a run, or attach to it, and follow it."""

import sys
from pathlib import Path

from infra.checkpoint import write_durably
from infra.config_io import ConfigError, dump_yaml, load_config
from infra.ledger import Ledger
from infra.ray_cluster import Cluster, open_cluster
from jobs.follow import follow_run
from jobs.progress import ProgressReport
from jobs.recipe import Recipe
from jobs.run_dir import RunDir
from pipeline.manifest import read_manifest, require_tags, require_whole
from pipeline.storage import storage_path

# Controllers started by one command when they are killed one after the other.
MAX_CONTROLLERS = 4


def open_run(recipe: Recipe, run_dir: Path) -> RunDir:
    """The run directory of a resolved recipe, created at the first submission.

    Raises ConfigError when the directory belongs to a run of another recipe: what differs is named.
    """
    if not recipe.stages:
        raise ConfigError(recipe.name, ["stages is empty: a run needs at least one stage"])
    run = RunDir(run_dir.resolve())
    run.path.mkdir(parents=True, exist_ok=True)
    if not run.recipe_file.exists():
        write_durably(run.recipe_file, dump_yaml(recipe))
        return run
    differences = recipe_differences(load_config(Recipe, run.recipe_file), recipe)
    if differences:
        raise ConfigError(
            str(run.path),
            [
                *differences,
                "the run was started with another recipe; continue it with svitt resume, or choose another --run-dir",
            ],
        )
    return run


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


def recipe_differences(old: Recipe, new: Recipe) -> list[str]:
    """One line per value that differs, by its dotted key."""

    def flat(tree: object, prefix: str = "") -> dict[str, object]:
        if isinstance(tree, dict):
            items = [(str(key), value) for key, value in tree.items()]
        elif isinstance(tree, list):
            items = [(str(index), value) for index, value in enumerate(tree)]
        else:
            return {prefix: tree}
        return {
            key: value
            for name, part in items
            for key, value in flat(part, f"{prefix}.{name}" if prefix else name).items()
        }

    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    missing = object()
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: the run has {before.get(key, 'nothing')}, the recipe now says {after.get(key, 'nothing')}"
        for key in keys
        if before.get(key, missing) != after.get(key, missing)
    ]


def drive(cluster: Cluster, run: RunDir, report: ProgressReport, is_detached: bool = False) -> int:
    """Starts the run's controller on the cluster, or attaches to the one at work, and follows it to the end.

    Returns the controller's exit code: 0 all stages done, 3 stopped, 1 failed. Detached: returns 0 at once.
    """
    run.stop_file.unlink(missing_ok=True)
    job_id = start_controller(cluster, run)
    if is_detached:
        report.say(f"submitted as job {job_id}; follow with: svitt status {run.path}")
        return 0
    code = 1
    for _ in range(MAX_CONTROLLERS):
        code = follow_run(cluster.jobs, job_id, run, report)
        if not cluster.jobs.status(job_id).was_killed:
            break
        report.say(f"the controller job {job_id} was killed; the next one takes the run up from its ledger")
        job_id = start_controller(cluster, run)
    return code


def start_controller(cluster: Cluster, run: RunDir) -> str:
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
    """Trains the stages of a run: on a local Ray until they are done, or detached on a cluster at `address`."""
    recipe = run.recipe()
    address = address or recipe.cluster.address
    with open_cluster(address, recipe.cluster.num_cpus) as cluster:
        return drive(cluster, run, report, is_detached=not cluster.is_owned)
