"""What the ranks of the engine tests run; a module of its own so that spawned processes can import it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
        for i, part in enumerate(parts):
            loss = engine.module(part).float().square().mean() / num_micro
            engine.backward(loss, is_last=i == num_micro - 1)
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
