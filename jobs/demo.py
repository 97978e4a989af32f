"""`svitt demo`: the whole main job on generated video, and again only what is missing."""

import time
from pathlib import Path

from infra.lease import Lease
from infra.ray_cluster import open_cluster
from jobs.data import clips, prepare, synth
from jobs.progress import ProgressReport
from jobs.recipe import Recipe
from jobs.status import show_status
from jobs.submit import drive, open_run
from jobs.tracking import tracking_uri


def run_demo(recipe: Recipe, run_dir: Path, report: ProgressReport) -> int:
    """Generates, cuts, prepares, trains, scores and shows. `recipe` is resolved to its workspace."""
    workspace = Path(recipe.workspace)
    began_s = time.monotonic()
    report.say(f"[1/4] a generated egocentric world in {workspace / 'world'}")
    synth(recipe, report)
    report.say(f"[2/4] narrations to clips in {workspace / 'annotations'}")
    clips(recipe, report)
    run = open_run(recipe, run_dir)
    with Lease(run.driver_lease), open_cluster(None, recipe.cluster.num_cpus) as cluster:
        run.stop_file.unlink(missing_ok=True)
        report.say(f"[3/4] videos to shards in {recipe.data.shards}")
        prepare(recipe, report, cluster)
        report.say(f"[4/4] training {len(recipe.stages)} stages in {run_dir}")
        code = drive(cluster, run, report)
    show_status(run, report)
    minutes, seconds = divmod(round(time.monotonic() - began_s), 60)
    if code == 0:
        report.say(f"All of it took {minutes} min {seconds} s.")
        report.say("Compare runs:   mlflow ui --backend-store-uri " + tracking_uri(recipe))
        report.say(f"Look again:     svitt status {run.path}")
        report.say(f"Your own data:  README.md, section 'Your own videos'. Everything lies in {workspace}")
    return code
