"""A whole run tracked by the team's server: `python -m tests.soak.tracking_server --folder SCRATCH [--demo]`.

Postgres, an S3-compatible store in memory and MLflow with a password are started, two tiny stages, or `svitt demo` as
it is, are trained with `tracking.uri` pointing there, weights go into the store; then runs, points, logged models,
versions, aliases and lineage are looked at, the server is stopped, and no process of it may be left. Needs the extras
server and dev, and Postgres. As root, SCRATCH must be a folder that the user postgres can enter.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
from mlflow.tracking import MlflowClient

from infra.checkpoint import WEIGHTS
from infra.journal import metric_history
from infra.mlflow_server import Settings, start, stop
from jobs.champion import CHAMPION, LATEST_STAGE, VERDICT
from jobs.tracking import fact_name
from tests.jobs.whole_runs import TINY, WholeRun, is_alive

TINY_STEPS = (*TINY, "stages.0.num_steps=8", "stages.1.num_steps=8", "checkpoint.every_steps=4")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def require(is_so: bool, what: str) -> None:
    if not is_so:
        raise SystemExit(f"not so: {what}")
    print(what, flush=True)


def look(job: WholeRun, client: MlflowClient) -> None:
    """What the server holds is what the run directory says."""
    for number in (1, 2):
        run_id = job.state.facts[fact_name(number)]
        run = client.get_run(run_id)
        points = sorted(
            (point.step, point.value) for point in client.get_metric_history(run_id, "train/loss")
        )
        expected = metric_history(job.run.journal(number), "train/loss")
        require(points == expected, f"stage {number}: {run.info.status}, all {len(points)} losses once")
        models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
        steps = sorted(int(model.tags["step"]) for model in models)
        wanted = [job.run.recipe().stages[number - 1].num_steps]
        require(steps[-1:] == wanted, f"stage {number}: logged models of steps {steps}")
        newest = max(models, key=lambda model: int(model.tags["step"]))
        names = sorted(metric.key for metric in newest.metrics or ())
        require("eval/egomcq/intra_video_acc" in names, f"stage {number}: {len(names)} scores linked")
    versions = client.search_model_versions("name = 'demo'")
    found = sorted(
        (int(version.version), version.tags["stage"], version.tags["step"]) for version in versions
    )
    require([stage for _, stage, _ in found] == ["1", "2"], f"versions (number, stage, step): {found}")
    latest = client.get_model_version_by_alias("demo", LATEST_STAGE)
    require(latest.tags["stage"] == "2", f"{LATEST_STAGE} is version {latest.version}")
    champion = client.get_model_version_by_alias("demo", CHAMPION)
    print(f"{CHAMPION} is version {champion.version}; version 2: {latest.tags[VERDICT]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--demo", action="store_true", help="the demo whole, in place of two tiny stages")
    given = parser.parse_args()
    folder: Path = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(folder / "server", free_port(), None)
    began_s = time.monotonic()
    server = start(settings)
    print(f"the server is up at {server.uri} after {time.monotonic() - began_s:.0f} s", flush=True)
    owner = psutil.Process(server.pid)
    processes = [owner, *owner.children(recursive=True)]
    resident = sum(process.memory_info().rss for process in processes) / 2**20
    print(f"{len(processes)} processes, {resident:.0f} MiB resident in all", flush=True)
    access = {
        "MLFLOW_TRACKING_USERNAME": server.user,
        "MLFLOW_TRACKING_PASSWORD": settings.password_file.read_text().strip(),
    }
    os.environ |= access
    tracked = (f"tracking.uri={server.uri}", "tracking.upload_weights=true")
    job = WholeRun(folder, "demo", tracked, () if given.demo else TINY_STEPS, access)
    try:
        began_s = time.monotonic()
        job.start("demo")
        code = job.wait(1800)
        if code != 0:
            raise SystemExit(job.tails())
        print(f"the run ended after {time.monotonic() - began_s:.0f} s", flush=True)
        client = MlflowClient(server.uri)
        look(job, client)
        weights_in_the_store(job, client, folder / "fetched")
        shown = subprocess.run(
            [sys.executable, "-m", "jobs", "lineage", CHAMPION, "--uri", server.uri, "--json"],
            capture_output=True,
            text=True,
        )
        require(
            shown.returncode == 0, f"svitt lineage {CHAMPION} ended with {shown.returncode} {shown.stderr}"
        )
        lineage = json.loads(shown.stdout)
        chain = [(facts["stage"], facts["step"]) for facts in lineage["checkpoints"]]
        require(
            chain[-1][0] == 1 and not lineage["broken"], f"lineage (stage, step): {chain}, nothing broken"
        )
        password = access["MLFLOW_TRACKING_PASSWORD"].encode()
        holding = [p for p in job.run.path.rglob("*") if p.is_file() and password in p.read_bytes()]
        require(not holding, "the password is in no file of the run directory")
    finally:
        job.kill_everything()
        processes = [owner, *owner.children(recursive=True)] if owner.is_running() else processes
        began_s = time.monotonic()
        stop(settings.folder)
    require(
        not [p for p in processes if is_alive(p)],
        f"stopped after {time.monotonic() - began_s:.0f} s, none left",
    )
    return 0


def weights_in_the_store(job: WholeRun, client: MlflowClient, target: Path) -> None:
    """The newest stage's weights come back from the store byte by byte."""
    version = client.get_model_version_by_alias("demo", LATEST_STAGE)
    model = client.get_logged_model(version.tags["svitt.model_id"])
    target.mkdir(exist_ok=True)
    mlflow.set_tracking_uri(client.tracking_uri)
    fetched = Path(
        mlflow.artifacts.download_artifacts(model.artifact_location + f"/{WEIGHTS}", dst_path=str(target))
    )
    kept = Path(job.state.stage(2).facts["checkpoint"]) / WEIGHTS
    require(
        fetched.read_bytes() == kept.read_bytes(),
        f"{WEIGHTS} of {model.artifact_location} is that of the run",
    )


if __name__ == "__main__":
    sys.exit(main())
