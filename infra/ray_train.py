"""Training processes placed, connected and restarted by Ray Train (V2). What they compute is the caller's.

Uses Ray's data-parallel trainer and joins torch.distributed itself: with TorchTrainer the driver and the
controlling actor import torch one after the other before any worker starts, 4 s of CPU time per stage.
"""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from infra.ray_jobs import ClusterError
from infra.runtime import environment, prepare_process, prepare_worker

logger = logging.getLogger(__name__)

_NOT_NEEDED = (DatasetsCallback, PlacementGroupCleanerCallback)
_RANK_KEYS = ("rank", "local_rank", "world_size", "is_preempted")
_DRIVER_ENVIRONMENT = {
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "1",  # a rank's device is cuda:<local_rank>
}


class TrainingError(ClusterError):
    """Training that ended without success. `worker_errors` holds each failed rank's own traceback."""

    def __init__(self, message: str, worker_errors: dict[int, str]) -> None:
        self.worker_errors = worker_errors
        super().__init__(message)


class _Trainer(DataParallelTrainer):
    """Without two actors, each of which costs a stage 3 s of CPU time at its start and wakes 100 times a second. One
    hands out Ray Data: ranks read their shards themselves. The other frees the ranks' places when the controlling
    actor dies and its driver lives on: here the driver then ends, and its places with it. A private method; where Ray
    renames it, the actors are merely back.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, _NOT_NEEDED)]


def run_workers(
    train_fn: Callable[[dict[str, Any]], None],
    train_config: dict[str, Any],
    *,
    num_workers: int,
    name: str,
    storage_path: Path,
    max_failures: int = 0,
    use_gpu: bool = False,
    cpus_per_worker: int = 1,
    collective_timeout_s: int = 600,
) -> None:
    """Run `train_fn` in `num_workers` processes joined by torch.distributed (NCCL with GPUs, gloo without).

    Every process gets a copy of `train_config` with `rank`, `local_rank`, `world_size` and `is_preempted` added, and
    `cpus_per_worker` compute threads. `is_preempted()`, collective, says whether one of their machines is about to be
    taken away. If one dies or raises, all are stopped and started again, up to
    `max_failures` times; `train_fn` finds its own checkpoint. `name` and `storage_path` (absolute) only hold
    Ray Train's bookkeeping. Needs an open cluster (`open_cluster`). Returns when all ranks have
    returned; raises TrainingError with the workers' messages.
    """
    if not ray.is_initialized():
        raise ClusterError("run_workers needs an open Ray cluster: call it inside `with open_cluster(...)`")
    taken = [key for key in _RANK_KEYS if key in train_config]
    if taken:
        raise ValueError(f"train_config sets {taken}, which are filled in for each worker")
    resources = {"CPU": cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    # Ray Train's controlling actor starts this one and waits for it; here the two start side by side.
    get_or_create_autoscaling_coordinator()
    with environment(_DRIVER_ENVIRONMENT):
        trainer = _Trainer(
            _enter_worker,
            train_loop_config={
                "train_fn": train_fn,
                "config": train_config,
                "num_threads": cpus_per_worker,
                "backend": "nccl" if use_gpu else "gloo",
                "timeout_s": collective_timeout_s,
            },
            scaling_config=ScalingConfig(
                num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(storage_path),
                failure_config=FailureConfig(max_failures=max_failures),
            ),
        )
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            raise _training_error(name, dict(error.worker_failures)) from None
        except ray.train.TrainingFailedError as error:
            raise TrainingError(f"training {name} failed: {_last_line(str(error))}", {}) from error
        except RayError as error:  # the controlling actor itself died
            raise TrainingError(
                f"training {name} lost its controlling process: {_last_line(str(error))}", {}
            ) from error


def _enter_worker(parcel: dict[str, Any]) -> None:
    prepare_process()
    import torch  # only workers need it: see the module docstring

    prepare_worker(parcel["num_threads"])
    context = ray.train.get_context()
    place = {
        "rank": context.get_world_rank(),
        "local_rank": context.get_local_rank(),
        "world_size": context.get_world_size(),
    }
    if parcel["backend"] == "nccl":
        torch.cuda.set_device(place["local_rank"])
    _join_process_group(parcel["backend"], parcel["timeout_s"], **place)
    try:
        parcel["train_fn"]({**parcel["config"], **place, "is_preempted": _is_preempted})
    finally:
        torch.distributed.destroy_process_group()


def _is_preempted() -> bool:
    """Asks Ray Train, which takes all ranks and a moment; where nobody watches for it, the answer is no."""
    if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0":
        return False
    return ray.train.get_preemption_info() is not None


def _join_process_group(backend: str, timeout_s: int, rank: int, local_rank: int, world_size: int) -> None:
    """Meet the other ranks over a store that rank 0 opens on a port the system picks."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=timeout_s)
    host = ray.util.get_node_ip_address()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if rank == 0 else None
    where = (host, store.port) if store is not None else None
    host, port = broadcast_from_rank_zero(where)  # type: ignore[misc]
    if store is None:
        store = TCPStore(host, port, is_master=False, timeout=timeout)
    os.environ.update(
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(world_size),
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _training_error(name: str, failures: dict[int, Exception]) -> TrainingError:
    texts = {rank: str(failure).strip() for rank, failure in sorted(failures.items())}
    lines = "".join(f"\n  rank {rank}: {_last_line(text)}" for rank, text in texts.items())
    return TrainingError(f"training {name} failed on {len(texts)} worker(s):{lines}", texts)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
