"""What the ranks of the tests of resuming at another world size run. Two ranks write, one goes on, two go on again."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from engine_cases import Layers, batch, live_bytes, saved_engine
from torch import Tensor

from infra.config import EngineConfig
from infra.engine import EngineError, build_engine
from infra.engine_memory import state_bytes

CASES: list[dict[str, Any]] = [
    {"backend": "plain", "precision": "bf16"},
    {"zero_stage": 0},
    {"zero_stage": 0, "precision": "bf16"},
    {"zero_stage": 1},
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 1, "precision": "bf16", "bf16_states": True},
    {"zero_stage": 2, "optimizer": "adamw"},
    {"zero_stage": 2, "precision": "bf16"},
    {"zero_stage": 2, "offload_optimizer": "cpu"},
    {"zero_stage": 3},
    {"zero_stage": 3, "precision": "bf16", "optimizer": "adamw"},
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
]


def calm_run(rank: int, folder: str) -> None:
    """Six steps on two ranks, with a checkpoint after the second: what the resumed runs have to match."""
    for number, case in enumerate(CASES):
        engine = saved_engine(0, case)
        engine.module.offset.fill_(3.0)  # a buffer that no fresh engine has
        losses = train_globally(engine, range(2))
        save(engine, place(folder, number, "two"))
        write(folder, number, "saved by two", state_of(engine, case))
        losses += train_globally(engine, range(2, 6))
        write(folder, number, "calm", losses)


def go_on_alone(rank: int, folder: str) -> None:
    for number, case in enumerate(CASES):
        engine = resumed(folder, number, case, "two")
        losses = train_globally(engine, range(2, 4))
        compare_losses(losses, read(folder, number, "calm")[2:4], case)
        save(engine, place(folder, number, "one"))
        write(folder, number, "saved by one", state_of(engine, case))
        compare(
            state_of(resumed(folder, number, case, "one"), case), read(folder, number, "saved by one"), case
        )


def go_on_in_two(rank: int, folder: str) -> None:
    for number, case in enumerate(CASES):
        engine = resumed(folder, number, case, "one")
        save(engine, place(folder, number, "two again"))
        losses = train_globally(engine, range(4, 6))
        compare_losses(losses, read(folder, number, "calm")[4:], case)
        engine.load(place(folder, number, "two again"))
        compare(state_of(engine, case), read(folder, number, "saved by one"), case)
        assert train_globally(engine, range(4, 6)) == losses, case
        assert not leftovers(folder, number)


def resumed(folder: str, number: int, case: dict[str, Any], name: str) -> Any:
    """A fresh engine after a load that must not touch the checkpoint nor leave anything beside it."""
    engine, saved = saved_engine(9, case), place(folder, number, name)
    before = digests(saved)
    engine.load(saved)
    compare(state_of(engine, case), read(folder, number, f"saved by {name}"), case)
    assert digests(saved) == before, f"{case}: load changed the checkpoint"
    return engine


def leftovers(folder: str, number: int) -> list[Path]:
    return list(Path(folder, str(number)).glob("tmp-*"))


def train_globally(engine: Any, steps: range) -> list[float]:
    """Losses of steps over eight rows, shared by the ranks there are."""
    losses = []
    for step in steps:
        rows = torch.cat([batch(step, 0), batch(step, 1)]).chunk(dist.get_world_size())[dist.get_rank()]
        loss = engine.module(rows.to(engine.dtype)).float().square().mean()
        engine.backward(loss)
        engine.step(lr=0.01 * (step + 1))
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses


def compare_losses(found: list[float], expected: list[float], case: dict[str, Any]) -> None:
    # In bf16 the ranks' gradients are rounded before they are averaged.
    tolerance = 2e-2 if case.get("precision") == "bf16" else 1e-6
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), case


def state_of(engine: Any, case: dict[str, Any]) -> dict[str, Tensor]:
    """Whole masters, moments, buffers, numbers of steps and weight decays, by name."""
    state: dict[str, Tensor] = {f"buffer {n}": b.clone() for n, b in engine.module.named_buffers()}
    optimizer, parameters = optimizer_of(engine), dict(engine.module.named_parameters())
    state["step"] = torch.tensor(sorted({int(part["step"]) for part in optimizer.state.values()}))
    state["decay"] = torch.tensor([group["weight_decay"] for group in optimizer.param_groups])
    if case.get("zero_stage") in (
        1,
        2,
    ):  # DeepSpeed links the first group alone, before the others have moments
        engine._engine.optimizer._hp_optimizer_states_linked = False
        engine._engine.optimizer._lazy_init_hp_params_optimizer_state()
    for key in ("exp_avg", "exp_avg_sq"):
        if case.get("backend") == "plain" or case["zero_stage"] == 0:
            moments = [part[key] for part in optimizer.state.values()]
            state[key] = torch.cat([moment.flatten() for moment in moments]).clone()
        else:
            for name, parameter in parameters.items():
                state[f"{key} {name}"] = whole(safe_get_full_optimizer_state(parameter, key))
    if case.get("backend") != "plain" and case["zero_stage"] > 0:
        for name, parameter in parameters.items():
            state[f"master {name}"] = whole(safe_get_full_fp32_param(parameter))
    state |= {f"weight {n}": w for n, w in engine.consolidated_state_dict().items()}
    return state


def whole(gathered: Tensor | None) -> Tensor:
    assert gathered is not None
    return gathered.clone()


def optimizer_of(engine: Any) -> torch.optim.Optimizer:
    outer = engine._optimizer if hasattr(engine, "_optimizer") else engine._engine.optimizer
    return getattr(outer, "optimizer", outer)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], case: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), f"{case}: {name} is {tensor}, was {expected[name]}"


def place(folder: str, number: int, name: str) -> Path:
    return Path(folder, str(number), name)


def save(engine: Any, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    engine.save(directory)


def write(folder: str, number: int, name: str, value: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(value, place(folder, number, f"{name}.pt"))
    dist.barrier()


def read(folder: str, number: int, name: str) -> Any:
    return torch.load(place(folder, number, f"{name}.pt"), weights_only=True)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


FROZEN = [{"zero_stage": 2, "precision": "bf16"}, {"zero_stage": 3}]


def frozen_engine(case: dict[str, Any], seed: int) -> Any:
    """Two million parameters, a quarter of them frozen, after two steps."""
    torch.manual_seed(seed)
    module = Layers()
    trainable = [p for p in module.parameters() if p.requires_grad]
    config = EngineConfig(**case, bucket_bytes=2**16)
    engine = build_engine(module, [{"params": trainable}], config, micro_batch_size=1)
    for _ in range(2):
        engine.backward(engine.module(torch.ones(1, 512, dtype=engine.dtype)).float().square().mean())
        engine.step(lr=0.001)
    return engine


def save_partly_frozen(rank: int, folder: str) -> None:
    for number, case in enumerate(FROZEN):
        engine = frozen_engine(case, seed=0)
        save(engine, place(folder, number, "two"))
        write(folder, number, "frozen", engine.consolidated_state_dict())
        check_one_copy(engine, case, place(folder, number, "two"))
        engine._engine.destroy()


def load_partly_frozen_alone(rank: int, folder: str) -> None:
    for number, case in enumerate(FROZEN):
        engine = frozen_engine(case, seed=1)
        check_one_copy(engine, case, place(folder, number, "two"))
        compare(engine.consolidated_state_dict(), read(folder, number, "frozen"), case)
        engine._engine.destroy()


def check_one_copy(engine: Any, case: dict[str, Any], directory: Path) -> None:
    before = live_bytes()
    engine.load(directory)
    grown = live_bytes() - before
    numbers = [sum(p.numel() for p in Layers().parameters()), 6 * (512 * 512 + 512)]
    resident = state_bytes(*numbers, EngineConfig(**case), dist.get_world_size()).resident
    assert grown < 0.02 * resident, f"{case}: {grown} bytes more after the load than before"


class Malice:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self._path,))


def refuse_code(rank: int, folder: str) -> None:
    """In any file, at a load at another size; every rank says so, and none of them waits for another."""
    name = "two" if dist.get_world_size() == 1 else "one"
    for number in (0, 3, 6, 9):  # the plain engine, ZeRO 1, 2, 3
        for file in place(folder, number, name).rglob("*.pt"):
            kept, mark = file.read_bytes(), Path(folder, f"ran-{rank}")
            dist.barrier()
            if rank == 0:
                torch.save({"dp_world_size": 1, "module": Malice(mark)}, file)
            dist.barrier()
            with pytest.raises(EngineError, match="UnpicklingError"):
                saved_engine(9, CASES[number]).load(place(folder, number, name))
            dist.barrier()
            if rank == 0:
                file.write_bytes(kept)
            assert not mark.exists(), f"{CASES[number]}: {file.name} ran"
        assert not leftovers(folder, number)


def refuse_what_cannot_be_divided(rank: int, folder: str) -> None:
    engine = saved_engine(9, {"zero_stage": 2})
    engine._config = engine._config.model_copy(update={"optimizer": "adamw_8bit"})
    with pytest.raises(EngineError, match=r"written by 2 ranks .* 1 now.*adamw_8bit.*resume with 2 ranks"):
        engine.load(place(folder, 6, "two"))
