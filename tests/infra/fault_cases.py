"""What the ranks of the tests of bad gradients and full disks run."""

import contextlib
import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_cases import batch, saved_engine, train
from resume_cases import compare, state_of

from infra.engine import EngineError

CASES: list[dict[str, Any]] = [
    {"backend": "plain"},
    {"backend": "plain", "precision": "bf16"},
    {"zero_stage": 0},
    {"zero_stage": 0, "precision": "bf16"},
    {"zero_stage": 1},
    {"zero_stage": 1, "precision": "bf16", "bf16_states": True},
    {"zero_stage": 2},
    {"zero_stage": 2, "precision": "bf16"},
    {"zero_stage": 2, "gradient_reduction": "backward"},
    {"zero_stage": 2, "offload_optimizer": "cpu", "gradient_reduction": "backward"},
    {"zero_stage": 2, "offload_optimizer": "cpu", "precision": "bf16"},
    {"zero_stage": 3},
    {"zero_stage": 3, "precision": "bf16", "gradient_reduction": "backward"},
    {"zero_stage": 3, "offload_optimizer": "cpu"},
]


def leave_out_bad_gradients(rank: int, _: str) -> None:
    for case in CASES:
        for num_micro in (1, 2):
            calm = saved_engine(0, case)
            train(calm, rank, range(3), num_micro)
            engine = saved_engine(0, case)
            train(engine, rank, range(1), num_micro)
            for factor in (float("nan"), float("inf")):
                spoilt_gradient(engine, rank, factor, num_micro)
                assert not on_all(engine.has_finite_gradient()), f"{case}: {factor} was not found"
                engine.discard()
            spoilt_gradient(engine, rank, 1.0, num_micro)
            assert on_all(engine.has_finite_gradient()), f"{case}: a good gradient was taken for a bad one"
            engine.discard()
            train(engine, rank, range(1, 2), num_micro)
            spoilt_gradient(engine, rank, float("inf"), num_micro)
            with pytest.raises(EngineError, match="not finite and updated nothing"):
                engine.step(lr=0.01)
            train(engine, rank, range(2, 3), num_micro)
            compare(state_of(engine, case), state_of(calm, case), {**case, "num_micro": num_micro})


def spoilt_gradient(engine: Any, rank: int, factor: float, num_micro: int) -> None:
    """Rank 1's last backward call spoils it."""
    with engine.accumulate() if num_micro > 1 else contextlib.nullcontext():
        for number, part in enumerate(batch(7, rank).to(engine.dtype).chunk(num_micro)):
            loss = engine.module(part).float().square().mean()
            if rank == 1 and number == num_micro - 1:
                loss = loss * factor
            engine.backward(loss)


def on_all(answer: bool) -> bool:
    flag = torch.tensor(float(answer))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


SAVED: list[dict[str, Any]] = [
    {"backend": "plain"},
    {"zero_stage": 0},
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 2},
    {"zero_stage": 2, "offload_optimizer": "cpu"},
    {"zero_stage": 3},
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
]


def save_apart(rank: int, folder: str) -> None:
    """Each rank into a folder of its own; put together, their files are a checkpoint."""
    for number, case in enumerate(SAVED):
        engine = saved_engine(0, case)
        train(engine, rank, range(2))
        own, both = Path(folder, f"{number}-rank-{rank}"), Path(folder, f"{number}")
        own.mkdir()
        engine.save(own)
        dist.barrier()
        if rank == 0:
            put_together([Path(folder, f"{number}-rank-{r}") for r in range(2)], both)
        dist.barrier()
        fresh = saved_engine(9, case)
        fresh.load(both)
        compare(state_of(fresh, case), state_of(engine, case), case)


def put_together(parts: list[Path], whole: Path) -> None:
    for part in parts:
        for file in [path for path in part.rglob("*") if path.is_file()]:
            target = whole / file.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            assert not target.exists(), f"two ranks wrote {target.name}"
            assert file.suffix == ".pt"
            shutil.move(file, target)


def survive_a_full_disk(rank: int, folder: str) -> None:
    """Rank 1's disk, then rank 0's; the plain engine and ZeRO 0 write on rank 0 alone."""
    for number, case in enumerate(SAVED):
        for full in (1, 0):
            if full == 1 and number < 2:
                continue
            engine, directory = saved_engine(0, case), Path(folder, f"full-{number}-{full}")
            train(engine, rank, range(1))
            directory.mkdir(exist_ok=True)
            with pytest.MonkeyPatch.context() as patch:
                if rank == full:
                    patch.setattr(torch, "save", disk_full)
                    with pytest.raises(EngineError, match=r"No space left on device.*save again"):
                        engine.save(directory)
                else:
                    engine.save(directory)
            engine.save(directory)
            dist.barrier()
            fresh = saved_engine(9, case)
            fresh.load(directory)
            compare(state_of(fresh, case), state_of(engine, case), case)


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
