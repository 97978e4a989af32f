"""DeepSpeed ZeRO 0-3 behind the Engine protocol. With `universal_checkpoint` the only module that imports deepspeed.

Its configuration dict is generated here from EngineConfig, so no number is written twice. Resuming at another
world size goes through `infra.universal_checkpoint`.
"""

import contextlib
import importlib
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import psutil
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from infra import native_ops, universal_checkpoint
from infra.config import EngineConfig
from infra.engine import (
    EngineError,
    ParameterGroups,
    StepOrder,
    adamw,
    all_finite,
    not_finite,
    rank,
    require_precision,
    set_learning_rate,
    to_portable,
    torch_dtype,
)
from infra.engine_memory import NVME_BUFFER_ELEMENTS, SUB_GROUP_ELEMENTS, state_bytes

logger = logging.getLogger(__name__)

_TAG = "engine"
# DeepSpeed's name, at ZeRO 1 and 2, of this rank's parts of the master weights.
_MASTERS = "single_partition_of_fp32_groups"
# Its names of what an offloaded optimizer passes gradients and new parameters through.
_HOST_BUFFERS = (
    "grad_partitions_flat_buffer",
    "temp_grad_buffer_for_cpu_offload",
    "param_buffer_of_bit16_for_cpu_offload_groups",
)
# Rank 0 may take long over a conversion; when it dies, the connection tells the others at once.
_CONVERSION_TIMEOUT = timedelta(hours=6)


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
        require_precision(config, self._device)
        _require_host(module, config, self._device)
        optimizer = _optimizer(parameter_groups, config, self._device)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        skip_shared_memory_build()
        _import_muon_uncompiled()
        with _quiet():
            deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_dict(config, micro_batch_size, on_gpu=self._device.type == "cuda"),
                dist_init_required=False,
            )
        self._files = engine.checkpoint_engine = _CheckpointFiles()
        # It would copy a conversion script into every checkpoint, where code has no place.
        engine._copy_recovery_script = lambda save_path: None
        self._engine: Any = engine
        if config.zero_stage == 2 and config.offload_optimizer != "none":
            self._free_gradients_on_the_host()
        self._order = StepOrder()
        self._grad_norm: float | None = None

    def _free_gradients_on_the_host(self) -> None:
        """DeepSpeed would keep a gradient on the device to the end of the backward pass that it has copied to the host:
        at the first layers, whose activations are the largest, nearly all of them.
        """
        optimizer = self._engine.optimizer
        copy = optimizer.copy_grads_in_partition

        def copy_and_free(param: nn.Parameter, group: int | None = None) -> None:
            copy(param, group)
            optimizer.clear_grad_attribute(param)

        optimizer.copy_grads_in_partition = copy_and_free

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

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        stage, reduction = self._config.zero_stage, self._config.gradient_reduction
        # ZeRO 0 and 1 hold whole gradients whatever is set, so there reducing often would only cost traffic.
        coalesces = stage == 1 or (stage > 1 and reduction == "step")
        block = self._engine.coalesce_grad_reduction() if coalesces else self._until_boundary()
        with self._order.accumulating():
            block.__enter__()
            try:
                yield
            except BaseException as error:
                # Other ranks may have got elsewhere: leave nothing to reduce, which would wait for them.
                self._engine.zero_grad()
                with _quiet():
                    block.__exit__(type(error), error, error.__traceback__)
                raise
            with _quiet():
                block.__exit__(None, None, None)

    @contextlib.contextmanager
    def _until_boundary(self) -> Iterator[None]:
        """DeepSpeed's own accumulation, whose end it must be told before the last backward call or here."""
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)
        if self._config.zero_stage == 0:
            self._engine.allreduce_gradients()
        else:
            self._engine.optimizer.finalize_gradient_accumulation_boundary()

    def backward(self, loss: Tensor) -> None:
        is_first = self._order.is_first_backward
        self._order.count_backward()
        if self._config.zero_stage > 0:
            # DeepSpeed tells two backward calls apart by the call of its own forward between them, which calling
            # the module leaves out: ZeRO 3 would replace the gradient instead of adding to it.
            self._engine.optimizer.clear_backward_seen_flag()
            if is_first:
                self._forget_gradients()
        with _quiet():
            self._engine.backward(loss, scale_wrt_gas=False)

    def discard(self) -> None:
        self._engine.zero_grad()
        if self._config.zero_stage > 0:
            optimizer = self._engine.optimizer
            optimizer.zero_grad(set_to_none=True)
            # Norms and the flags of an overflow, which DeepSpeed notes as gradients arrive.
            optimizer.reset_cpu_buffers()
            self._forget_gradients()
            if self._config.zero_stage == 3:
                optimizer.inf_or_nan_tracker.zero_()
            else:
                # In place: the parameters' mapping to their gradients holds these dicts.
                for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
                    gradients.update(dict.fromkeys(gradients))
                optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        self._order.reset()

    @property
    def calls_are_collective(self) -> bool:
        config = self._config
        reduces_often = config.zero_stage == 2 and config.gradient_reduction == "backward"
        return dist.get_world_size() > 1 and (config.zero_stage == 3 or reduces_often)

    def _forget_gradients(self) -> None:
        """Zero the buffers that outlive a step: a parameter out of this step's reach would get its last gradient
        again, and one that only a later backward call reaches would have it added.
        """
        optimizer = self._engine.optimizer
        stale = [*getattr(optimizer, "accumulated_grads_in_cpu", {}).values()]
        if self._config.zero_stage == 3:
            stale.append(optimizer.grad_partitions_flat_buffer)
        if self._config.offload_optimizer != "none":
            name = "fp32_partitioned_groups_flat" if self._config.zero_stage == 3 else _MASTERS
            stale += [part.grad for part in getattr(optimizer, name) if part.grad is not None]
        for buffer in stale:
            buffer.zero_()

    def gradients(self) -> dict[str, Tensor]:
        self._order.require_gradient("gradients")
        gradients = {}
        with _quiet():
            for name, parameter in self.module.named_parameters():
                if parameter.requires_grad:
                    found = safe_get_full_grad(parameter)
                    shape = getattr(parameter, "ds_shape", parameter.shape)
                    gradients[name] = torch.zeros(shape) if found is None else to_portable(found)
        return gradients

    def has_finite_gradient(self) -> bool:
        self._order.require_gradient("has_finite_gradient")
        return all_finite(self._gradient_share())

    def _gradient_share(self) -> list[Tensor]:
        """What this rank will update its part of the parameters with, averaged; views where there are some."""
        optimizer = self._engine.optimizer
        if self._config.zero_stage == 0:
            return [p.grad for p in self.module.parameters() if p.grad is not None]
        if self._config.zero_stage == 3:
            return [optimizer.grad_partitions_flat_buffer]
        if self._config.offload_optimizer != "none":
            optimizer._wait_for_offload_copies()
            return [part.grad for part in getattr(optimizer, _MASTERS) if part.grad is not None]
        return _tensors(list(optimizer.averaged_gradients.values()))

    def step(self, lr: float) -> None:
        self._order.require_gradient("step")
        self._order.reset()
        set_learning_rate(self._engine.optimizer.param_groups, lr)
        own_norm = self._plain_norm() if self._engine.get_global_grad_norm() is None else None
        is_applied = own_norm is None or math.isfinite(own_norm)
        if is_applied:
            with _quiet():
                self._engine.step()
            is_applied = self._engine.was_step_applied()
        if not is_applied:  # DeepSpeed passes over the update and says nothing
            self.discard()
            raise not_finite()
        norm = self._engine.get_global_grad_norm()
        self._grad_norm = own_norm if norm is None else float(norm)

    def offloaded(self) -> list[Tensor]:
        found: list[Tensor] = []
        if self._config.offload_optimizer == "cpu":
            optimizer = self._engine.optimizer
            masters = getattr(
                optimizer, "fp32_partitioned_groups_flat" if self._config.zero_stage == 3 else _MASTERS
            )
            moments = [value for state in optimizer.optimizer.state.values() for value in state.values()]
            gradients = [part.grad for part in masters]
            buffers = [getattr(optimizer, name, None) for name in _HOST_BUFFERS]
            kept = getattr(optimizer, "accumulated_grads_in_cpu", {}).values()
            found += _tensors([masters, moments, gradients, buffers, list(kept)])
        if self._config.offload_parameters == "cpu":
            found += [parameter.ds_tensor for parameter in self.module.parameters()]  # type: ignore[attr-defined]
        return found

    def save(self, directory: Path) -> None:
        self._files.failure = None
        with _quiet():
            try:
                self._engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False)
            except OSError as error:  # of copying NVMe files; the other ranks are at what follows it
                self._files.failure = error
                if self._config.zero_stage == 3:
                    self._engine.optimizer.checkpoint_event_epilogue()
                dist.barrier()
        if self._files.failure is not None:
            raise EngineError(
                f"writing the DeepSpeed state of rank {rank()} to {directory} failed: {self._files.failure}; what lies "
                "there is incomplete: free some space and save again"
            ) from self._files.failure

    def load(self, directory: Path) -> None:
        folder = directory / _TAG
        if not folder.is_dir():
            raise EngineError(
                f"{directory} holds no '{_TAG}' folder: it was not written by backend: deepspeed"
            )
        num_writers = universal_checkpoint.num_writers(folder)
        is_same_size = self._config.zero_stage == 0 or num_writers in (0, dist.get_world_size())
        try:
            with _quiet(), universal_checkpoint.data_only():
                self._read(directory) if is_same_size else self._read_resized(directory, num_writers)
        except EngineError:
            raise
        except (
            Exception
        ) as error:  # DeepSpeed raises bare AssertionError, ZeRORuntimeException, KeyError, ...
            raise EngineError(
                f"loading the DeepSpeed state in {directory} at world size {dist.get_world_size()} and ZeRO "
                f"stage {self._config.zero_stage} failed: {type(error).__name__}: {error}"
            ) from error
        self._order.reset()

    def _read(self, directory: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(directory), tag=_TAG)
        if path is None:
            raise EngineError(f"DeepSpeed found nothing to load in {directory / _TAG}")

    def _read_resized(self, directory: Path, num_writers: int) -> None:
        """Load what `num_writers` ranks wrote, through a folder beside `directory` that all ranks can read."""
        self._require_resizable(directory, num_writers)
        scratch = directory.parent / f"tmp-universal-{directory.name}"
        self._convert(directory, scratch, num_writers)
        settings, optimizer = self._engine._config, self._engine.optimizer.optimizer
        own_values = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        settings.load_universal_checkpoint = True
        try:
            self._read(scratch)
        finally:
            settings.load_universal_checkpoint = False
        universal_checkpoint.restore_the_rest(directory / _TAG, self.module, optimizer, own_values)
        dist.barrier()  # all have read it
        if rank() == 0:  # what cannot be removed goes with the other leftovers when a store is opened
            shutil.rmtree(scratch, ignore_errors=True)

    def _require_resizable(self, directory: Path, num_writers: int) -> None:
        config = self._config
        for problem, setting in (
            (config.optimizer == "adamw_8bit", "optimizer: adamw_8bit"),
            ("nvme" in (config.offload_optimizer, config.offload_parameters), "offload to nvme"),
        ):
            if problem:
                raise EngineError(
                    f"{directory} was written by {num_writers} ranks and there are {dist.get_world_size()} now; "
                    f"states of {setting} cannot be divided anew: resume with {num_writers} ranks"
                )

    def _convert(self, directory: Path, scratch: Path, num_writers: int) -> None:
        """Rank 0 converts while the others wait; what goes wrong there is raised on all."""
        outcome: list[str | None] = [None]
        waiting: Any = dist.new_group(backend="gloo", timeout=_CONVERSION_TIMEOUT)
        if rank() == 0:
            names = [name for name, p in self.module.named_parameters() if p.requires_grad]
            try:
                shutil.rmtree(scratch, ignore_errors=True)
                universal_checkpoint.convert(directory / _TAG, scratch / _TAG, names)
            except Exception as error:  # whatever DeepSpeed or a damaged file raises
                logger.debug("conversion failed", exc_info=True)
                shutil.rmtree(scratch, ignore_errors=True)
                outcome = [f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(outcome, src=0, group=waiting)
        dist.destroy_process_group(waiting)
        if outcome[0] is not None:
            raise EngineError(
                f"converting the DeepSpeed state in {directory}, written by {num_writers} ranks, for "
                f"{dist.get_world_size()} failed in {scratch}: {outcome[0]}"
            )

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
        # So that a GPU takes the way of the CPU tests. What overlapping would gain on several was not measured.
        "overlap_comm": False,
        "contiguous_gradients": True,
        "round_robin_gradients": False,
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket_elements,
            # By default a model below a billion parameters stays whole on every rank from its first use on.
            "stage3_max_live_parameters": bucket_elements,
            "stage3_max_reuse_distance": bucket_elements,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_gather_16bit_weights_on_model_save": False,
            "sub_group_size": SUB_GROUP_ELEMENTS,
        }
    for key, place in (
        ("offload_optimizer", config.offload_optimizer),
        ("offload_param", config.offload_parameters),
    ):
        if place != "none":
            zero[key] = {"device": place, "pin_memory": on_gpu}
        if place == "nvme":
            zero[key]["nvme_path"] = config.nvme_path
    if config.offload_parameters == "nvme":
        # By default a billion elements stay in host memory and a gigabyte of buffers is pinned.
        zero["offload_param"] |= {"max_in_cpu": 0, "buffer_size": NVME_BUFFER_ELEMENTS}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # the caller marks its bounds: Engine.accumulate
        "gradient_clipping": config.gradient_clipping,
        # The optimizer is made here, for every device and place of its states: see _optimizer.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {
            "enabled": config.precision == "bf16",
            "bf16_master_weights_and_grads": config.bf16_states,
            "bf16_optimizer_states": config.bf16_states,
        },
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "checkpoint": {"tag_validation": "Ignore"},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def _optimizer(groups: ParameterGroups, config: EngineConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW for the place where its states will be: on the host DeepSpeed's own, which must be compiled."""
    groups = [dict(group) for group in groups]  # ZeRO puts its partitions into them
    if config.offload_optimizer == "none":
        return adamw(groups, config, device)
    try:
        native_ops.load("cpu_adam")
    except native_ops.NativeBuildError as error:
        if config.bf16_states:
            raise EngineError(
                f"bf16_states with offload_optimizer needs DeepSpeed's cpu_adam: {error}; set bf16_states: false "
                "or offload_optimizer: none"
            ) from error
        logger.warning(
            "offload_optimizer: torch's AdamW computes on the host, slower than DeepSpeed's cpu_adam: %s",
            error,
        )
        return adamw(groups, config, torch.device("cpu"))
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(
        groups,
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,  # type: ignore[arg-type]  # its default is an int
        fp32_optimizer_states=not config.bf16_states,
    )


def _require_host(module: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Check the settings against this host before anything large is allocated. Raises EngineError."""
    world_size = dist.get_world_size()
    if config.zero_stage == 3 and world_size == 1 and not config.offloads:
        logger.warning(
            "zero_stage: 3 with one rank shards nothing and only adds work; zero_stage: 1 takes less memory and time"
        )
    if config.offloads and device.type == "cpu":
        logger.warning(
            "offload moves state from a GPU to the host, but this rank trains on the CPU: it only costs memory"
        )
    if "nvme" in (config.offload_optimizer, config.offload_parameters):
        _require_nvme(Path(str(config.nvme_path)))
    if config.offloads:
        parameters = list(module.parameters())
        memory = state_bytes(
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
            config,
            world_size,
        )
        # A launcher that sets no LOCAL_WORLD_SIZE is counted as one rank per host: the check then errs to pass.
        needed = memory.host * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        available = psutil.virtual_memory().available
        if needed > available:
            raise EngineError(
                f"offload needs {needed:,} bytes of host memory for the ranks of this host, {available:,} are "
                "available; offload less, to nvme, or over more hosts"
            )


def _require_nvme(path: Path) -> None:
    if not path.is_dir():
        raise EngineError(f"nvme_path {path} is not a folder; create it on a fast local disk")
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise EngineError(f"nvme_path {path} cannot be written: {error}; choose another folder") from error
    try:
        native_ops.load("async_io")
    except native_ops.NativeBuildError as error:
        raise EngineError(f"offload to nvme is not possible on this host: {error}") from error


def _tensors(parts: Any) -> list[Tensor]:
    """Tensors in nested lists, whatever else stands there."""
    if isinstance(parts, Tensor):
        return [parts]
    return [tensor for part in parts for tensor in _tensors(part)] if isinstance(parts, list) else []


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


class _CheckpointFiles(TorchCheckpointEngine):
    """Remembers what went wrong in writing instead of raising it: other ranks wait for this one further on."""

    failure: Exception | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failure = self.failure or error

    def save(self, state_dict: Any, path: str) -> None:
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError on a full disk
            self.failure = self.failure or error


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
