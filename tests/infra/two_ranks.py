"""Two gloo processes for tests: `run_two(function, argument)` runs `function(rank, argument)` on both."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from infra.runtime import prepare_process


def run_two(
    function: Callable[[int, Any], None], argument: Any, store_dir: Path, world_size: int = 2
) -> None:
    """Start processes without shared state; raises what a rank raised.

    They are forked from a server that has imported DeepSpeed once: importing it in each would take most of
    the time. The server has computed nothing, so a rank starts as a fresh interpreter would.
    """
    prepare_process()
    mp.get_context("forkserver").set_forkserver_preload(["infra.deepspeed_engine", "engine_cases"])
    store = store_dir / f"store-{len(list(store_dir.glob('store-*')))}"
    mp.start_processes(
        _enter,
        args=(function, argument, str(store), world_size),
        nprocs=world_size,
        start_method="forkserver",
    )


def _enter(
    rank: int, function: Callable[[int, Any], None], argument: Any, store: str, world_size: int
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        function(rank, argument)
    finally:
        dist.destroy_process_group()
