"""What the ranks of the engine tests run; a module of its own so that spawned processes can import it."""

import contextlib
import gc
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra import native_ops
from infra.config import EngineConfig
from infra.engine import EngineError, build_engine
from infra.engine_memory import state_bytes


class Tiny(nn.Module):
    """Two layers, a scale of shape [1], a buffer; enough to meet every code path."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.tensor([0.5, -0.5]))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs))) * self.scale + self.offset


def tiny(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny()


def groups(module: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0, "lr_scale": 0.5},
    ]


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 3, generator=generator)


def train(engine: Any, rank: int, steps: range, num_micro: int = 1) -> list[float]:
    norms = []
    for step in steps:
        parts = batch(step, rank).to(engine.dtype).chunk(num_micro)
        with engine.accumulate() if num_micro > 1 else contextlib.nullcontext():
            for part in parts:
                engine.backward(engine.module(part).float().square().mean() / num_micro)
        engine.step(lr=0.01 * (step + 1))
        norms.append(engine.grad_norm)
    return norms


PARITY = [
    {"zero_stage": 2, "gradient_clipping": 0.5, "tolerance": 1e-6},
    {"zero_stage": 2, "num_micro": 2, "tolerance": 1e-6},
    {"zero_stage": 0, "gradient_clipping": 0.5, "tolerance": 1e-6},
    {"zero_stage": 1, "tolerance": 1e-6},
    {"zero_stage": 3, "tolerance": 1e-6},
    {"zero_stage": 1, "precision": "bf16", "tolerance": 2e-3},
]


def compare_all_and_save(rank: int, folder: str) -> None:
    """One start of DeepSpeed for all cases: starting it is what takes long."""
    for case in PARITY:
        try:
            compare_engines(rank, dict(case))
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    train_and_save(rank, folder)


def compare_engines(rank: int, settings: dict[str, Any]) -> None:
    tolerance = settings.pop("tolerance")
    num_micro = settings.pop("num_micro", 1)
    results = []
    for backend in ("plain", "deepspeed"):
        module = tiny(seed=rank)  # ranks start apart: engines must make them equal
        config = EngineConfig(backend=backend, **settings)
        engine = build_engine(module, groups(module), config, micro_batch_size=4)
        norms = train(engine, rank, range(3), num_micro)
        results.append((norms, engine.consolidated_state_dict()))
    (plain_norms, plain), (zero_norms, zero) = results
    assert all(math.isfinite(norm) for norm in plain_norms)
    torch.testing.assert_close(zero_norms, plain_norms, atol=tolerance, rtol=tolerance)
    assert zero.keys() == plain.keys() or (rank != 0 and not zero and not plain)
    for name, tensor in plain.items():
        torch.testing.assert_close(zero[name], tensor, atol=tolerance, rtol=tolerance, msg=name)
    if settings.get("zero_stage") == 2:
        from deepspeed import comm

        assert comm.comm.cdb.shm_comm_op is None, "DeepSpeed compiled its shared-memory collectives"


SAVED = [
    {"zero_stage": 2},
    {"zero_stage": 2, "offload_optimizer": "cpu", "gradient_reduction": "backward"},
    {"zero_stage": 3, "precision": "bf16", "optimizer": "adamw"},
    {"zero_stage": 1, "precision": "bf16", "bf16_states": True},
]


def train_and_save(rank: int, folder: str) -> None:
    for case, saved in zip(SAVED, saved_folders(folder), strict=True):
        engine = saved_engine(0, case)
        train(engine, rank, range(2), num_micro=2)
        saved.mkdir(exist_ok=True)
        engine.save(saved)
        train(engine, rank, range(2, 4), num_micro=2)
        state = engine.consolidated_state_dict()
        if rank == 0:
            torch.save(state, saved / "calm.pt")


def load_and_train(rank: int, folder: str) -> None:
    for case, saved in zip(SAVED, saved_folders(folder), strict=True):
        engine = saved_engine(9, case)
        engine.load(saved)
        train(engine, rank, range(2, 4), num_micro=2)
        state = engine.consolidated_state_dict()
        if rank == 0:
            calm = torch.load(saved / "calm.pt", weights_only=True)
            assert state.keys() == calm.keys()
            for name, tensor in state.items():
                assert torch.equal(tensor, calm[name]), f"{case}: {name}"


def saved_folders(folder: str) -> list[Path]:
    return [Path(folder) / str(i) for i in range(len(SAVED))]


def saved_engine(seed: int, case: dict[str, Any]) -> Any:
    module = tiny(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_ops, "load", refuse_to_build)
        return build_engine(module, groups(module), EngineConfig(**case), micro_batch_size=4)


class TwoParts(nn.Module):
    """An encoder and a head, called apart as a cached contrastive loss does; `spare` is not part of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 2)
        self.spare = nn.Linear(4, 1)

    def forward(self, part: str, inputs: Tensor) -> Tensor:
        return getattr(self, part)(inputs)


def cached_step(engine: Any, rank: int, step: int) -> None:
    """Five backward calls: of the head on cached features, then of the encoder by its cached gradient."""
    module = engine.module.train()
    parts = batch(step, rank).to(engine.dtype).chunk(4)
    with torch.no_grad():
        features = torch.cat([module("encoder", part) for part in parts])
    leaf = features.requires_grad_()
    with engine.accumulate():
        loss = module("head", leaf).float().square().mean()
        if step != 1:
            loss = loss + module("spare", leaf).float().square().mean()
        engine.backward(loss)
        assert leaf.grad is not None
        for part, cached in zip(parts, leaf.grad.chunk(4), strict=True):
            engine.backward((module("encoder", part) * cached).float().sum())


def cached_run(rank: int, settings: dict[str, Any]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Gradients of each of three steps and rank 0's weights after them."""
    torch.manual_seed(rank)
    module = TwoParts()
    config = EngineConfig(**settings, gradient_clipping=0.05, bucket_bytes=2**16)
    engine = build_engine(module, groups(module), config, micro_batch_size=4)
    gradients = []
    for step in range(3):
        cached_step(engine, rank, step)
        gradients.append(engine.gradients())
        engine.step(lr=0.01 * (step + 1))
    return gradients, engine.consolidated_state_dict()


ACCUMULATION = [
    {"zero_stage": stage, "offload_optimizer": place, "gradient_reduction": reduction}
    for stage in (0, 1, 2, 3)
    for place in ("none", "cpu")
    for reduction in ("step", "backward")
    if (stage, place) != (0, "cpu")
] + [
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    {"zero_stage": 2, "optimizer": "fused_adamw"},
]


def compare_accumulation(rank: int, _: str) -> None:
    expected = cached_run(rank, {"backend": "plain"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_ops, "load", refuse_to_build)
        for case in ACCUMULATION:
            compare_runs(cached_run(rank, case), expected, str(case))
    # DeepSpeed's own optimizer only where it stands ready: compiling it takes longer than all tests here.
    if native_ops.is_built("cpu_adam"):
        for stage in (1, 3):
            case = {"zero_stage": stage, "offload_optimizer": "cpu"}
            compare_runs(cached_run(rank, case), expected, f"{case} with cpu_adam")


def refuse_to_build(name: str) -> None:
    raise native_ops.NativeBuildError(f"{name} is not built in this test")


def compare_runs(found: Any, expected: Any, case: str) -> None:
    for step, (gradients, right) in enumerate(zip(found[0], expected[0], strict=True)):
        assert gradients.keys() == right.keys()
        for name, gradient in gradients.items():
            close(gradient, right[name], f"{case}: gradient of {name} in step {step}")
    for name, weight in found[1].items():
        close(weight, expected[1][name], f"{case}: {name}")


def close(found: Tensor, expected: Tensor, where: str) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, msg=lambda text: f"{where}: {text}")


def refuse_what_the_host_lacks(rank: int, folder: str) -> None:
    """Each fault with its message; none gets as far as DeepSpeed."""
    from infra import deepspeed_engine

    def build(**settings: Any) -> None:
        module = tiny()
        build_engine(module, groups(module), EngineConfig(**settings), micro_batch_size=4)

    def fails(message: str, **settings: Any) -> None:
        with pytest.raises(EngineError, match=message):
            build(**settings)

    nvme = {"zero_stage": 3, "offload_optimizer": "nvme"}
    fails("nvme_path .*missing is not a folder; create it", **nvme, nvme_path=f"{folder}/missing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_ops, "load", refuse_to_build)
        fails("nvme is not possible on this host: async_io is not built", **nvme, nvme_path=folder)
        states = {"zero_stage": 2, "precision": "bf16", "bf16_states": True, "offload_optimizer": "cpu"}
        fails(
            "bf16_states with offload_optimizer needs DeepSpeed's cpu_adam: .* set bf16_states: false",
            **states,
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", refuse_to_write)
        fails("nvme_path .* cannot be written: .*read-only.* choose another folder", **nvme, nvme_path=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
        fails(r"offload needs [\d,]{3,} bytes of host memory .*, 100 are available", offload_optimizer="cpu")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_engine.logger, "warning", lambda text, *values: lines.append(text % values))
        build(zero_stage=3)
        patch.setattr(native_ops, "load", refuse_to_build)
        build(zero_stage=1, offload_optimizer="cpu")
    assert "zero_stage: 3 with one rank shards nothing" in lines[0]
    assert "this rank trains on the CPU: it only costs memory" in lines[1]
    assert "torch's AdamW computes on the host" in lines[2]


def refuse_to_write(**_: Any) -> None:
    raise OSError(30, "read-only file system")


class Layers(nn.Module):
    """2.1 million parameters, of which a quarter are frozen; large enough that states outweigh everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
        self.layers[:2].requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


MEMORY = [
    {"backend": "plain"},
    {"backend": "plain", "precision": "bf16"},
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 2, "precision": "bf16"},
    {"zero_stage": 3},
    {"zero_stage": 3, "precision": "bf16"},
    {"zero_stage": 2, "precision": "bf16", "bf16_states": True},
]


def compare_memory(rank: int, _: str) -> None:
    """Live tensors between two steps against the formulas, which no activation disturbs."""
    for case in MEMORY:
        before = live_bytes()
        module = Layers()
        trainable = [p for p in module.parameters() if p.requires_grad]
        numbers = [sum(p.numel() for p in some) for some in (module.parameters(), trainable)]
        config = EngineConfig(**case, bucket_bytes=2**16)
        engine = build_engine(module, [{"params": trainable}], config, micro_batch_size=1)
        inputs = torch.ones(1, 512, dtype=engine.dtype)
        for _step in range(2):
            engine.backward(engine.module(inputs).float().square().mean())
            engine.step(lr=0.0)
        found = live_bytes() - before - inputs.nbytes
        expected = state_bytes(*numbers, config, dist.get_world_size()).resident
        assert abs(found / expected - 1) < 0.03, f"{case}: found {found}, expected {expected}"
        if case.get("backend") != "plain":
            engine._engine.destroy()  # type: ignore[attr-defined]
        del engine, module, trainable, inputs


def live_bytes() -> int:
    """Bytes of all storages that a tensor or its gradient holds."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = (t.untyped_storage() for t in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
