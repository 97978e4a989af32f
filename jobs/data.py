"""The three data verbs: `synth`, `clips`, `prepare`. Each does only what is missing."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from infra.checkpoint import write_durably
from infra.config_io import config_hash, dump_yaml
from infra.ray_cluster import Cluster, open_cluster
from jobs.clips import run_clips, summary_lines
from jobs.prepare import PrepareResult, run_prepare
from jobs.progress import ProgressReport
from jobs.recipe import Recipe
from jobs.synth import run_synth
from pipeline.manifest import Manifest

WORLD = "world"
ANNOTATIONS = "annotations"
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
        return (result for _, result in cluster.map_tasks(fn, items))

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


def describe(manifest: Manifest) -> str:
    """One line: clips, shards, size, losses by reason, fingerprint."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in manifest.rejected_by_reason.items())
    return (
        f"{manifest.name}: {manifest.num_clips} clips in {len(manifest.shards)} shards, "
        f"{manifest.bytes / 2**20:.1f} MiB; {manifest.num_rejected} rejected{f' ({reasons})' if reasons else ''}; "
        f"fingerprint {manifest.fingerprint[:12]}"
    )


def prepare_on(recipe: Recipe, address: str | None, report: ProgressReport) -> int:
    """The `prepare` verb: on a local Ray, inside the cluster it runs in, or as a job of a cluster elsewhere."""
    address = address or recipe.cluster.address
    with open_cluster(address, recipe.cluster.num_cpus) as cluster:
        if cluster.is_connected:
            prepare(recipe, report, cluster)
            return 0
        recipe_file = Path(recipe.data.shards) / "prepare-recipe.yaml"
        recipe_file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(recipe_file, dump_yaml(recipe))
        job_id = f"{recipe.name}-prepare-{config_hash(recipe)[:8]}"
        number = 1
        while (known := cluster.jobs.find(f"{job_id}-{number}")) is not None and known.is_finished:
            number += 1
        command = ["python", "-m", "jobs", "prepare", str(recipe_file), "--address", "auto"]
        job_id = cluster.jobs.submit_once(f"{job_id}-{number}", command).submission_id
        report.say(f"preparing as job {job_id}")
        for text in cluster.jobs.tail(job_id):
            report.say(text.rstrip("\n"))
        return cluster.jobs.wait(job_id).shell_code
