"""What a training step needs from an engine, and the readable reference that computes it in plain torch.

A step is: `loss = ...engine.module(...)`, `engine.backward(loss)`, `engine.step(lr)`; several backward calls
stand inside `with engine.accumulate():`, which is left before `step`. Ranks that do not all answer
`has_finite_gradient` with yes call `discard` instead of `step`.
Checkpoint directories come from `infra.checkpoint`, which also verifies them before `load` is called.
"""

import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

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

    def accumulate(self) -> AbstractContextManager[None]:
        """Inside, any number of `backward` calls add up to one gradient; leave it before `step`.

        One such block, or a single `backward` without it, makes a step; anything else raises EngineError. All
        ranks make the same number of calls, and each call reaches the same parameters on all of them.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (0-dim), as it is: nothing is divided by a number of calls."""
        ...

    def discard(self) -> None:
        """Throw away what backward calls have added since the last step, also after an error inside `accumulate`.

        All ranks call it, and the step begins anew.
        """
        ...

    @property
    def calls_are_collective(self) -> bool:
        """Whether module calls or `backward` wait for other ranks, so that no rank can leave a step on its own."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Averaged gradient of every trainable parameter, in fp32 on the CPU, on every rank.

        Between the last `backward` (or the end of `accumulate`) and `step`; else EngineError. Zero where no
        backward call reached a parameter. It gathers everything: for tests and diagnosis.
        """
        ...

    def has_finite_gradient(self) -> bool:
        """Whether this rank's share of the gradient is free of inf and NaN; ranks may differ. Gathers nothing.

        Between the last `backward` (or the end of `accumulate`) and `step`; else EngineError.
        """
        ...

    def step(self, lr: float) -> None:
        """Average gradients over ranks, clip, update with AdamW at `lr` (times a group's `lr_scale`).

        Raises EngineError, on all ranks, where the averaged gradient or its norm is not finite: then nothing is
        updated and the step begins anew.
        """
        ...

    def offloaded(self) -> list[Tensor]:
        """Tensors of this rank that lie in host memory instead of the device's, those made so far."""
        ...

    def save(self, directory: Path) -> None:
        """Write what `load` needs to go on bitwise equal.

        No two ranks write files of one name, so each may be given a directory of its own if `load` is given one with
        the files of all. Raises EngineError on the ranks whose writing failed; the others return.
        """
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote at the same ZeRO stage, at any world size. Raises EngineError.

        At another world size DeepSpeed writes a converted copy into `directory`'s parent, `tmp-universal-...`, and
        removes it. It stays behind where a rank fails in reading it.
        """
        ...

    def consolidated_state_dict(self) -> dict[str, Tensor]:
        """Whole model in fp32 on the CPU at rank 0; an empty dict on other ranks."""
        ...


class StepOrder:
    """Refuses calls out of order, which would otherwise train on a part of the gradient without a word."""

    def __init__(self) -> None:
        self._state: Literal["empty", "open", "ready", "broken"] = "empty"
        self._num_backward = 0

    @property
    def is_first_backward(self) -> bool:
        return self._num_backward == 0

    @property
    def is_open(self) -> bool:
        """Whether `accumulate` has been entered and not left."""
        return self._state == "open"

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        if self._state != "empty":
            raise EngineError(f"accumulate() was entered {self._found()}; {_ORDER}")
        self._state = "open"
        try:
            yield
        except BaseException:
            self._state = "broken"
            raise
        self._state = "ready"

    def count_backward(self) -> None:
        if self._state in ("ready", "broken"):
            raise EngineError(f"backward() was called {self._found()}; {_ORDER}")
        self._num_backward += 1
        if self._state == "empty":
            self._state = "ready"

    def require_gradient(self, call: str) -> None:
        if self._state != "ready" or self._num_backward == 0:
            raise EngineError(f"{call}() was called {self._found()}; {_ORDER}")

    def reset(self) -> None:
        self._state, self._num_backward = "empty", 0

    def _found(self) -> str:
        if self._state == "broken":
            return "after an error had ended accumulate(), which left a part of a gradient: discard() it"
        if self._state == "open":
            return "inside accumulate()"
        return f"after {self._num_backward} backward calls since the last step"


_ORDER = "a step is one backward(), or one `with accumulate():` around several, then step()"


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
        require_precision(config, self._device)
        self._optimizer = adamw(groups, config, self._device)
        self._order = StepOrder()
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

    def accumulate(self) -> AbstractContextManager[None]:
        return self._order.accumulating()

    def backward(self, loss: Tensor) -> None:
        self._order.count_backward()
        loss.backward()

    def discard(self) -> None:
        for parameter in self._module.parameters():
            parameter.grad = None
        self._order.reset()

    @property
    def calls_are_collective(self) -> bool:
        return False

    def gradients(self) -> dict[str, Tensor]:
        self._order.require_gradient("gradients")
        return {
            name: to_portable(_average(torch.zeros_like(p) if p.grad is None else p.grad.clone()))
            for name, p in self._module.named_parameters()
            if p.requires_grad
        }

    def has_finite_gradient(self) -> bool:
        self._order.require_gradient("has_finite_gradient")
        return all_finite(p.grad for p in self._module.parameters() if p.grad is not None)

    def step(self, lr: float) -> None:
        self._order.require_gradient("step")
        self._order.reset()
        for parameter, master in self._pairs:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            master.grad = _average(gradient).float()
            parameter.grad = None
        squares = [
            master.grad.double().square().sum() for _, master in self._pairs if master.grad is not None
        ]
        norm = float(torch.stack(squares).sum().sqrt())
        if not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise not_finite()
        self._grad_norm = norm
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

    def offloaded(self) -> list[Tensor]:
        return []

    def save(self, directory: Path) -> None:
        if rank() == 0:
            state = {
                "module": self._module.state_dict(),
                "masters": [master for _, master in self._pairs],
                "optimizer": self._optimizer.state_dict(),
            }
            try:
                torch.save(state, directory / "plain_engine.pt")
            except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError on a full disk
                raise EngineError(
                    f"writing the plain engine's state to {directory} failed: {error}; what lies there is incomplete: "
                    "free some space and save again"
                ) from error

    def load(self, directory: Path) -> None:
        path = directory / "plain_engine.pt"
        if not path.is_file():
            raise EngineError(f"{directory} holds no plain_engine.pt: it was not written by backend: plain")
        try:  # not to the device: what is loaded would stand there beside what it replaces
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # UnpicklingError, EOFError, RuntimeError, ...: as the damage is
            raise EngineError(f"reading {path} failed: {type(error).__name__}: {error}") from error
        self._module.load_state_dict(state["module"])
        with torch.no_grad():
            for (_, master), saved in zip(self._pairs, state["masters"], strict=True):
                master.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        self._order.reset()

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


def adamw(
    groups: ParameterGroups, config: EngineConfig, device: torch.device | None = None
) -> torch.optim.Optimizer:
    """AdamW as the settings name it, over parameters on `device`. The learning rate is 0: `step` sets it.

    Not `foreach`, torch's own choice: it allocates the size of the moments anew at every step, and that step is
    then the peak of memory. Raises EngineError where the 8-bit optimizer cannot run.
    """
    common: dict[str, Any] = {
        "lr": 0.0,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw_8bit":
        return _bitsandbytes(device).AdamW8bit(groups, **common)
    return torch.optim.AdamW(groups, **common, foreach=False, fused=config.optimizer == "fused_adamw")


def _bitsandbytes(device: torch.device | None) -> Any:
    if device is None or device.type != "cuda":
        raise EngineError(
            "optimizer: adamw_8bit needs a GPU, and this rank trains on the CPU; set optimizer: adamw"
        )
    try:
        return importlib.import_module("bitsandbytes").optim
    except ImportError as error:
        raise EngineError(
            f"optimizer: adamw_8bit needs the package bitsandbytes, which cannot be imported ({error}); install it "
            "(pip install bitsandbytes) or set optimizer: adamw"
        ) from error


def require_precision(config: EngineConfig, device: torch.device) -> None:
    """Raise EngineError for bf16 on a GPU that only emulates it; a CPU computes it in any case."""
    if config.precision != "bf16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise EngineError(
            f"precision: bf16 needs a GPU of compute capability 8.0 or later (A100, RTX 30); {name} is not one; set "
            "precision: fp32"
        )


def set_learning_rate(groups: Sequence[dict[str, Any]], lr: float) -> None:
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is inf or NaN. The extremes show both, without a copy, at one wait for the device."""
    extremes = [
        value.float() for tensor in tensors if tensor.numel() for value in torch.aminmax(tensor.detach())
    ]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def not_finite() -> EngineError:
    return EngineError(
        "step() found a gradient that is not finite and updated nothing; ask has_finite_gradient() on all ranks "
        "before, and discard() such a gradient"
    )


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
    """Mean over ranks, in place."""
    if not dist.is_initialized():
        return gradient
    dist.all_reduce(gradient)
    return gradient.div_(dist.get_world_size())
