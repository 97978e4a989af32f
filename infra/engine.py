"""What a training step needs from an engine, and the readable reference that computes it in plain torch.

A step is: `loss = ...engine.module(...)`, `engine.backward(loss)` once or several times, `engine.step(lr)`.
Checkpoint directories come from `infra.checkpoint`, which also verifies them before `load` is called.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.config import EngineConfig

ParameterGroups = Sequence[dict[str, Any]]


class EngineError(Exception):
    """An engine that cannot be built, or a state it cannot load."""


class Engine(Protocol):
    """One rank's half of a data-parallel optimizer. Its methods are collective: all ranks call them."""

    @property
    def module(self) -> nn.Module:
        """The model to call; its parameters have `dtype`, so cast float inputs to it."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the averaged gradient of the last step, before clipping; None before the first."""
        ...

    def backward(self, loss: Tensor, is_last: bool = True) -> None:
        """Add the gradient of `loss` (0-dim). `is_last` False if more backward calls come before `step`."""
        ...

    def step(self, lr: float) -> None:
        """Average gradients over ranks, clip, update with AdamW at `lr` (times a group's `lr_scale`)."""
        ...

    def save(self, directory: Path) -> None:
        """Write what `load` needs to go on bitwise equal; every rank writes its files into one directory."""
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote at the same world size and ZeRO stage. Raises EngineError."""
        ...

    def consolidated_state_dict(self) -> dict[str, Tensor]:
        """Whole model in fp32 on the CPU at rank 0; an empty dict on other ranks."""
        ...


class PlainEngine:
    """Reference engine: torch AdamW, gradients averaged by all_reduce, every rank holds everything.

    `parameter_groups` are AdamW's (`params` and per-group `weight_decay`, `lr_scale`, ...). bf16 keeps fp32
    master copies of the parameters, as DeepSpeed does.
    """

    def __init__(
        self,
        module: nn.Module,
        parameter_groups: ParameterGroups,
        config: EngineConfig,
        device: torch.device | None = None,
    ) -> None:
        self._config = config
        self._device = device or torch.device("cpu")
        self._dtype = torch_dtype(config)
        self._module = module.to(self._device)
        _start_equal(self._module)
        self._module.to(self._dtype)  # before the masters are taken: DeepSpeed rounds in this order too
        masters = {p: p.detach().float().clone() for p in module.parameters() if p.requires_grad}
        self._pairs = [(p, masters[p]) for group in parameter_groups for p in group["params"]]
        groups = [{**group, "params": [masters[p] for p in group["params"]]} for group in parameter_groups]
        self._optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        self._grad_norm: float | None = None

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def grad_norm(self) -> float | None:
        return self._grad_norm

    def backward(self, loss: Tensor, is_last: bool = True) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        for parameter, master in self._pairs:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            master.grad = _average(gradient).float()
            parameter.grad = None
        squares = [
            master.grad.double().square().sum() for _, master in self._pairs if master.grad is not None
        ]
        self._grad_norm = float(torch.stack(squares).sum().sqrt())
        limit = self._config.gradient_clipping
        if limit > 0 and self._grad_norm > limit:
            for _, master in self._pairs:
                if master.grad is not None:
                    master.grad.mul_(limit / (self._grad_norm + 1e-6))
        set_learning_rate(self._optimizer.param_groups, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in self._pairs:
                parameter.copy_(master)

    def save(self, directory: Path) -> None:
        if rank() == 0:
            state = {
                "module": self._module.state_dict(),
                "masters": [master for _, master in self._pairs],
                "optimizer": self._optimizer.state_dict(),
            }
            torch.save(state, directory / "plain_engine.pt")

    def load(self, directory: Path) -> None:
        path = directory / "plain_engine.pt"
        if not path.is_file():
            raise EngineError(f"{directory} holds no plain_engine.pt: it was not written by backend: plain")
        state = torch.load(path, map_location=self._device, weights_only=True)
        self._module.load_state_dict(state["module"])
        with torch.no_grad():
            for (_, master), saved in zip(self._pairs, state["masters"], strict=True):
                master.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])

    def consolidated_state_dict(self) -> dict[str, Tensor]:
        if rank() != 0:
            return {}
        masters = {id(parameter): master for parameter, master in self._pairs}
        names = {name: masters.get(id(p), p) for name, p in self._module.named_parameters()}
        state = {**self._module.state_dict(), **names}
        return {name: to_portable(tensor) for name, tensor in state.items()}


def build_engine(
    module: nn.Module,
    parameter_groups: ParameterGroups,
    config: EngineConfig,
    micro_batch_size: int,
    device: torch.device | None = None,
) -> Engine:
    """The engine the settings name. Importing DeepSpeed (2 s) happens only when it is the one."""
    if config.backend == "plain":
        return PlainEngine(module, parameter_groups, config, device)
    from infra.deepspeed_engine import DeepSpeedEngine  # heavy: only where it is used

    return DeepSpeedEngine(module, parameter_groups, config, micro_batch_size, device)


def torch_dtype(config: EngineConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def set_learning_rate(groups: Sequence[dict[str, Any]], lr: float) -> None:
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def to_portable(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU; floating point becomes fp32."""
    copy = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
    return copy.contiguous()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _start_equal(module: nn.Module) -> None:
    """All ranks begin with the weights of rank 0."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)


def _average(gradient: Tensor) -> Tensor:
    if not dist.is_initialized():
        return gradient
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()
