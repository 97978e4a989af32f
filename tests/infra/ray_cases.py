"""What runs inside the Ray processes of the tests, and their drivers; a module of its own so that they can import it.

No test process is a driver itself: Ray's library may end a driver at once, and with it all tests of the process.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from infra.runtime import prepare_process


def square(item: int) -> int:
    return item * item


def fail_at_three(item: int) -> int:
    if item == 3:
        raise ValueError("a bad clip")
    return item


def die_once(marker: str) -> str:
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def sum_ranks(config: dict[str, Any]) -> None:
    """Rank 1 dies once, then both add up their ranks and rank 0 writes what it saw."""
    import torch
    import torch.distributed as dist

    marker = Path(config["folder"]) / "died"
    if config["rank"] == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    total = torch.tensor([config["rank"] + 1.0])
    dist.all_reduce(total)
    if config["rank"] == 0:
        seen = {
            "total": total.item(),
            "world_size": config["world_size"],
            "threads": torch.get_num_threads(),
            "local_rank": os.environ["LOCAL_RANK"],
            "niceness": os.nice(0),
        }
        (Path(config["folder"]) / "seen.json").write_text(json.dumps(seen))


def raise_on_rank_one(config: dict[str, Any]) -> None:
    if config["rank"] == 1:
        raise ValueError("clip 17 has no frames")


def train_in_job(folder: str, address: str) -> None:
    """Driver of a submitted job: joins the cluster, runs two workers, then a failing pair."""
    from infra.ray_cluster import open_cluster
    from infra.ray_train import TrainingError, run_workers

    storage = Path(folder) / "ray"
    with open_cluster(address):
        run_workers(
            sum_ranks, {"folder": folder}, num_workers=2, name="sum", storage_path=storage, max_failures=1
        )
        try:
            run_workers(raise_on_rank_one, {}, num_workers=2, name="raise", storage_path=storage)
        except TrainingError as error:
            (Path(folder) / "error.txt").write_text(str(error))


def kill_the_controlling_actor(config: dict[str, Any]) -> None:
    import psutil

    if config["rank"] == 0:
        raylet = psutil.Process().parent()
        assert raylet is not None
        for process in raylet.children():
            if any("TrainController" in word for word in process.cmdline()):
                process.kill()
    time.sleep(600)


def lose_the_controlling_actor(folder: str, address: str) -> None:
    """Driver of a submitted job whose two workers take all of the cluster's CPUs."""
    from infra.ray_cluster import open_cluster
    from infra.ray_train import TrainingError, run_workers

    with open_cluster(address):
        try:
            run_workers(
                kill_the_controlling_actor,
                {},
                num_workers=2,
                name="lose",
                storage_path=Path(folder) / "ray",
            )
        except TrainingError as error:
            (Path(folder) / "lost.txt").write_text(str(error))


def hold_a_cluster() -> None:
    """Owner of a cluster until its stdin closes; tells where it is."""
    from infra.ray_cluster import open_cluster

    with open_cluster(num_cpus=2) as cluster:
        assert cluster.is_owned
        print(json.dumps({"url": cluster.url, "address": cluster.address_inside}), flush=True)
        sys.stdin.read()


def map_tasks(folder: str) -> None:
    """Owner of a cluster; writes down what tasks gave: squares, one that survives a death, one that raises."""
    from infra.ray_cluster import TaskError, open_cluster

    with open_cluster(num_cpus=2) as cluster:
        squares = list(cluster.map_tasks(square, list(range(6)), max_in_flight=2))
        survived = list(cluster.map_tasks(die_once, [f"{folder}/marker"]))
        try:
            list(cluster.map_tasks(fail_at_three, [1, 2, 3, 4], describe=lambda item: f"clip {item}"))
        except TaskError as error:
            is_cause_kept = isinstance(error.__cause__, ValueError)
            failed = {"words": str(error), "item": error.item, "is_cause_kept": is_cause_kept}
    told = {"squares": sorted(squares), "survived": survived, "failed": failed}
    (Path(folder) / "told.json").write_text(json.dumps(told))


def own_a_cluster() -> None:
    """Owner of a cluster with a running job and task, waiting to be killed."""
    from infra.ray_cluster import open_cluster

    with open_cluster(num_cpus=2) as cluster:
        job = cluster.jobs.submit_once("victim", "sleep 600; true")
        while cluster.jobs.status(job.submission_id).status == "PENDING":
            time.sleep(0.1)
        for _ in cluster.map_tasks(sleep_long, [1]):
            pass


def sleep_long(item: int) -> int:
    print("ready", flush=True)
    (Path(os.environ["SVITT_TEST_FOLDER"]) / "ready").touch()
    time.sleep(600)
    return item


if __name__ == "__main__":
    prepare_process()
    drivers = {
        "hold": hold_a_cluster,
        "map": map_tasks,
        "train": train_in_job,
        "lose": lose_the_controlling_actor,
        "own": own_a_cluster,
    }
    drivers[sys.argv[1]](*sys.argv[2:])
