"""The three data verbs: `synth`, `clips`, `prepare`. Each does only what is missing."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from infra.config_io import config_hash, dump_yaml
from infra.durable import write_durably
from infra.ray_cluster import Cluster, open_cluster
from jobs.clips import run_clips, summary_lines
from jobs.prepare import EGOMCQ, TRAIN, PrepareResult, run_prepare
from jobs.progress import ProgressReport
from jobs.recipe import Recipe
from jobs.synth import run_synth
from pipeline.manifest import (
    Manifest,
    ShardEntry,
    read_manifest,
    verify_files,
    verify_index,
    verify_shard,
)
from pipeline.storage import StoragePath, is_url, storage_path

WORLD = "world"
ANNOTATIONS = "annotations"
MAX_RETRIES = 20
Check = Literal["verify", "repair"]
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def synth(recipe: Recipe, report: ProgressReport) -> None:
    """Writes the generated world to <workspace>/world."""
    total = recipe.world.num_train_videos + recipe.world.num_heldout_videos
    with report.task("drawing videos", total) as task:
        run_synth(
            Path(recipe.workspace) / WORLD,
            recipe.world,
            progress=report.say,
            on_video=lambda done, _: task.set(done),
        )


def clips(recipe: Recipe, report: ProgressReport) -> None:
    """Writes the EgoClip TSV and the EgoMCQ JSON to <workspace>/annotations."""
    workspace = Path(recipe.workspace)
    summary = run_clips(workspace / WORLD, workspace / ANNOTATIONS, recipe.clips, seed=recipe.seed)
    for line in summary_lines(summary):
        report.say(line)


def prepare(recipe: Recipe, report: ProgressReport, cluster: Cluster) -> PrepareResult:
    """Writes shards and manifests to <shards>/train and <shards>/egomcq, spread over the cluster."""
    data = recipe.data

    def mapper(fn: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
        # A video that takes the process down is given up after two deaths; a shard may hold several such videos.
        return (result for _, result in cluster.map_tasks(fn, items, max_retries=MAX_RETRIES))

    result = run_prepare(
        egoclip=data.egoclip,
        egoclip_format=data.egoclip_format,
        egomcq_json=data.egomcq,
        videos_dir=data.videos,
        taxonomy=data.taxonomy,
        out_dir=data.shards,
        config=recipe.prepare,
        mapper=mapper,
        progress=report,
    )
    for line in result.read_report.lines():
        report.say(line)
    for manifest in (result.train, result.egomcq):
        if manifest is not None:
            report.say(describe(manifest))
    return result


def verify(recipe: Recipe, report: ProgressReport, cluster: Cluster) -> int:
    """Reads every shard again and says what is damaged; returns the number of faults. Raises ShardError for a set that
    was never finished.
    """
    num_faults = 0
    for name in (TRAIN, EGOMCQ) if recipe.data.egomcq else (TRAIN,):
        shards_dir = storage_path(recipe.data.shards).absolute() / name
        manifest = read_manifest(shards_dir)
        faults = [*verify_files(shards_dir, manifest), *verify_index(shards_dir, manifest)]

        # A plain function: Ray makes tasks of nothing else.
        def check(entry: ShardEntry, shards_dir: StoragePath = shards_dir) -> list[str]:
            return verify_shard(shards_dir, entry)

        with report.task(f"{name}: reading shards again", len(manifest.shards)) as task:
            for _, found in cluster.map_tasks(check, manifest.shards):
                faults.extend(found)
                task.advance()
        for fault in sorted(faults):
            report.say(f"{name}: {fault}")
        report.say(
            f"{name}: {len(manifest.shards)} shards, {manifest.bytes / 2**20:.1f} MiB read: {len(faults)} faults"
        )
        num_faults += len(faults)
    return num_faults


def describe(manifest: Manifest) -> str:
    """One line: clips, shards, size, losses by reason, fingerprint."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in manifest.rejected_by_reason.items())
    return (
        f"{manifest.name}: {manifest.num_clips} clips in {len(manifest.shards)} shards, "
        f"{manifest.bytes / 2**20:.1f} MiB; {manifest.num_rejected} rejected{f' ({reasons})' if reasons else ''}; "
        f"fingerprint {manifest.fingerprint[:12]}"
    )


def prepare_on(
    recipe: Recipe, address: str | None, report: ProgressReport, check: Check | None = None
) -> int:
    """The `prepare` verb: on a local Ray, inside the cluster it runs in, or as a job of a cluster elsewhere."""
    address = address or recipe.cluster.address
    with open_cluster(address, recipe.cluster.num_cpus) as cluster:
        if cluster.is_connected:
            num_faults = verify(recipe, report, cluster) if check is not None else 0
            if check != "verify" and (check is None or num_faults):
                prepare(recipe, report, cluster)
            elif num_faults:
                report.say("svitt prepare ... --repair rebuilds what is damaged, and nothing else")
                return 1
            return 0
        # Where the job finds it, too: beside the shards, or in the workspace where those are behind a URL.
        folder = recipe.workspace if is_url(recipe.data.shards) else recipe.data.shards
        recipe_file = Path(folder) / "prepare-recipe.yaml"
        recipe_file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(recipe_file, dump_yaml(recipe))
        job_id = f"{recipe.name}-prepare-{config_hash(recipe)[:8]}"
        number = 1
        while (known := cluster.jobs.find(f"{job_id}-{number}")) is not None and known.is_finished:
            number += 1
        command = ["python", "-m", "jobs", "prepare", str(recipe_file), "--address", "auto"]
        if check is not None:
            command.append(f"--{check}")
        job_id = cluster.jobs.submit_once(f"{job_id}-{number}", command).submission_id
        report.say(f"preparing as job {job_id}")
        for text in cluster.jobs.tail(job_id):
            report.say(text.rstrip("\n"))
        return cluster.jobs.wait(job_id).shell_code
