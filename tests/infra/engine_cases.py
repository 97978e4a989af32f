"""What the ranks of the engine tests run; a module of its own so that spawned processes can import it."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra import native_ops
from infra.config import EngineConfig
from infra.engine import EngineError, build_engine


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


def train_and_save(rank: int, folder: str) -> None:
    module = tiny()
    engine = build_engine(module, groups(module), EngineConfig(zero_stage=2), micro_batch_size=4)
    train(engine, rank, range(2))
    engine.save(Path(folder))
    train(engine, rank, range(2, 4))
    state = engine.consolidated_state_dict()
    if rank == 0:
        torch.save(state, Path(folder) / "calm.pt")


def load_and_train(rank: int, folder: str) -> None:
    module = tiny(seed=9)
    engine = build_engine(module, groups(module), EngineConfig(zero_stage=2), micro_batch_size=4)
    engine.load(Path(folder))
    train(engine, rank, range(2, 4))
    state = engine.consolidated_state_dict()
    if rank == 0:
        calm = torch.load(Path(folder) / "calm.pt", weights_only=True)
        assert state.keys() == calm.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, calm[name]), name


def load_at_another_size(rank: int, folder: str) -> None:
    module = tiny()
    engine = build_engine(module, groups(module), EngineConfig(zero_stage=2), micro_batch_size=4)
    with pytest.raises(EngineError, match="at world size 1 and ZeRO stage 2 failed"):
        engine.load(Path(folder))


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
