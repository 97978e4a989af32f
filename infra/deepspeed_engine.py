"""DeepSpeed ZeRO 0-3 behind the Engine protocol. The only module that imports deepspeed.

Its configuration dict is generated here from EngineConfig, so no number is written twice. Left out: resuming
at another world size (DeepSpeed's universal format) and offload of parameters.
"""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from infra.config import EngineConfig
from infra.engine import (
    EngineError,
    ParameterGroups,
    rank,
    set_learning_rate,
    to_portable,
    torch_dtype,
)

logger = logging.getLogger(__name__)

_TAG = "engine"
# What DeepSpeed's own checkpoints hold besides tensors and plain values.
_SAFE_TYPES = [ZeroStageEnum, fragment_address, LossScaler]


class DeepSpeedEngine:
    """ZeRO over the ranks of torch.distributed, which must be initialised (gloo on the CPU, NCCL on GPUs)."""

    def __init__(
        self,
        module: nn.Module,
        parameter_groups: ParameterGroups,
        config: EngineConfig,
        micro_batch_size: int,
        device: torch.device | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise EngineError("DeepSpeedEngine needs torch.distributed: start it with run_workers")
        scalars = [name for name, parameter in module.named_parameters() if parameter.dim() == 0]
        if scalars:
            raise EngineError(f"DeepSpeed cannot hold 0-dim parameters; give {scalars} the shape [1]")
        self._config = config
        self._device = device or torch.device("cpu")
        if config.offload_optimizer and self._device.type == "cpu":
            raise EngineError(
                "offload_optimizer moves state from a GPU to the host; this rank trains on the CPU"
            )
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        skip_shared_memory_build()
        _import_muon_uncompiled()
        with _quiet():
            deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
            engine, *_ = deepspeed.initialize(
                model=module,
                model_parameters=[dict(group) for group in parameter_groups],  # type: ignore[arg-type]
                config=deepspeed_dict(config, micro_batch_size, on_gpu=self._device.type == "cuda"),
                dist_init_required=False,
            )
        engine.checkpoint_engine = _SafeCheckpointEngine()
        self._engine: Any = engine
        self._grad_norm: float | None = None

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self._config)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def grad_norm(self) -> float | None:
        return self._grad_norm

    def backward(self, loss: Tensor, is_last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        with _quiet():
            self._engine.backward(loss)

    def step(self, lr: float) -> None:
        set_learning_rate(self._engine.optimizer.param_groups, lr)
        own_norm = self._plain_norm() if self._engine.get_global_grad_norm() is None else None
        with _quiet():
            self._engine.step()
        norm = self._engine.get_global_grad_norm()
        self._grad_norm = own_norm if norm is None else float(norm)

    def save(self, directory: Path) -> None:
        with _quiet():
            self._engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False)
        if rank() == 0:  # DeepSpeed adds a conversion script; code has no place in a checkpoint
            for script in directory.glob("*.py"):
                script.unlink()

    def load(self, directory: Path) -> None:
        if not (directory / _TAG).is_dir():
            raise EngineError(
                f"{directory} holds no '{_TAG}' folder: it was not written by backend: deepspeed"
            )
        try:
            with _quiet():
                path, _ = self._engine.load_checkpoint(str(directory), tag=_TAG)
        except (
            Exception
        ) as error:  # DeepSpeed raises bare AssertionError, ZeRORuntimeException, KeyError, ...
            raise EngineError(
                f"loading the DeepSpeed state in {directory} at world size {dist.get_world_size()} and ZeRO "
                f"stage {self._config.zero_stage} failed: {type(error).__name__}: {error}"
            ) from error
        if path is None:
            raise EngineError(f"DeepSpeed found nothing to load in {directory / _TAG}")

    @property
    def _holds_whole_fp32(self) -> bool:
        """Whether this rank's parameters are the weights themselves: gathering each costs 2 ms on gloo."""
        return self._config.zero_stage < 3 and self.dtype == torch.float32

    def _plain_norm(self) -> float | None:
        """Norm of the averaged gradients; DeepSpeed tells none at ZeRO stage 0 in fp32."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else None

    def consolidated_state_dict(self) -> dict[str, Tensor]:
        is_writer = rank() == 0
        state: dict[str, Tensor] = {}
        with _quiet():
            for name, parameter in self.module.named_parameters():
                # None: a frozen parameter, which has no optimizer state.
                gathered = None if self._holds_whole_fp32 else safe_get_full_fp32_param(parameter)
                if is_writer:
                    state[name] = to_portable(parameter if gathered is None else gathered)
        if is_writer:
            for name, tensor in self.module.state_dict().items():
                if name not in state:
                    state[name] = to_portable(tensor)
        return state


def deepspeed_dict(config: EngineConfig, micro_batch_size: int, on_gpu: bool) -> dict[str, Any]:
    """The DeepSpeed configuration of one rank. The learning rate is 0: the caller sets it at every step."""
    bucket_elements = config.bucket_bytes // 4
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket_elements,
        "allgather_bucket_size": bucket_elements,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "round_robin_gradients": False,
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket_elements,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # the caller marks the boundary: Engine.backward(is_last)
        "gradient_clipping": config.gradient_clipping,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.0,
                "betas": list(config.betas),
                "eps": config.eps,
                "weight_decay": config.weight_decay,
                "torch_adam": not config.offload_optimizer,  # anything else is compiled on first use
            },
        },
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "checkpoint": {"tag_validation": "Ignore"},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def skip_shared_memory_build() -> None:
    """Keep `init_distributed` from compiling DeepSpeed's shared-memory collectives (30-110 s, needs g++).

    DeepSpeed asks this private dict whether an operation can be built; gloo is used instead. A test guards
    it. Setting it before DeepSpeed fills it also saves running the compiler checks.
    """
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which every `initialize` does, without its three `torch.compile` decorators.

    They load the whole of torch's compiler, 1.9 s of CPU time in every rank, for an optimizer not offered here.
    """
    compiler = torch.compile
    torch.compile = lambda *_, **__: lambda function: function  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compiler


class _SafeCheckpointEngine(TorchCheckpointEngine):
    """Runs no code from the file: tensors, plain values and the three allow-listed types only."""

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(_SAFE_TYPES):
            return torch.load(path, map_location=map_location, weights_only=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide deprecation notes about collectives that DeepSpeed calls and we cannot change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings(
            "ignore", category=UserWarning, module=r"deepspeed\..*|torch\.distributed\..*"
        )
        yield
