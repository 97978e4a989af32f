"""Bytes that one rank's engine holds besides activations: parameters, gradients, optimizer, temporaries. Torch-free.

Each term was measured against the allocations of DeepSpeed 0.19.8 and of the plain engine.
"""

from typing import NamedTuple

from infra.config import EngineConfig

# ZeRO 3 updates this many elements at a time, which bounds what a step allocates.
SUB_GROUP_ELEMENTS = 2**22
# Room for one parameter on its way from NVMe; DeepSpeed refuses a larger parameter. It pins five of them.
NVME_BUFFER_ELEMENTS = 2**25
_NUM_PARAMETER_BUFFERS = 5
# A master weight, its gradient and both moments pass through host memory.
_NUM_OPTIMIZER_BUFFERS = 4


class EngineMemory(NamedTuple):
    """Bytes of one rank. `parameters`, `optimizer` and `buckets` last; a step then adds `gradients`, then `step`."""

    parameters: int  # between two steps
    optimizer: int  # master weights, both moments, and ZeRO 3's lasting gradients
    gradients: int  # at most, while backward and the reduction run
    step: int  # at most, while the update runs: gradients that are left and temporaries
    buckets: int  # of reductions, and ZeRO 3's gathered parameters
    host: int  # everything offloaded, with its buffers

    @property
    def resident(self) -> int:
        """Device bytes between two steps."""
        return self.parameters + self.optimizer

    @property
    def backward(self) -> int:
        """Device bytes at the end of backward, to which activations come."""
        return self.resident + self.gradients + self.buckets

    @property
    def update(self) -> int:
        """Device bytes at the worst moment of `step`, when no activation is left."""
        return self.resident + self.step + self.buckets


def state_bytes(
    num_parameters: int,
    num_trainable: int,
    config: EngineConfig,
    world_size: int,
    largest_parameter: int = 0,
) -> EngineMemory:
    """Bytes on one rank of `world_size`, for a module of that many elements.

    `largest_parameter` is the number of elements of the largest one: some temporaries have its size, which
    matters where an embedding makes up a good part of the model.
    """
    if config.backend == "plain":
        return _plain(num_parameters, num_trainable, config, largest_parameter)
    if config.zero_stage == 0:
        return _zero_0(num_parameters, num_trainable, config, largest_parameter)
    return _sharded(num_parameters, num_trainable, config, world_size, largest_parameter)


def _plain(total: int, trainable: int, config: EngineConfig, largest: int) -> EngineMemory:
    width = _width(config)
    return EngineMemory(
        parameters=width * total,
        optimizer=(4 + _moment_bytes(config)) * trainable,  # a copy of the parameters in fp32 too
        gradients=width * (trainable + largest),
        step=4 * trainable + 16 * largest,  # the norm squares one gradient in fp64
        buckets=0,
        host=0,
    )


def _zero_0(total: int, trainable: int, config: EngineConfig, largest: int) -> EngineMemory:
    width = _width(config)
    masters = 4 if width == 2 else 0
    return EngineMemory(
        parameters=width * total,
        optimizer=(masters + _moment_bytes(config)) * trainable,
        gradients=2 * width * trainable,  # reduced in a flat copy
        step=(width + masters) * trainable + (8 * largest if config.optimizer == "adamw" else 0),
        buckets=0,
        host=0,
    )


def _sharded(total: int, trainable: int, config: EngineConfig, world_size: int, largest: int) -> EngineMemory:
    width, stage = _width(config), config.zero_stage
    master = 2 if config.bf16_states else 4
    share = -(-trainable // world_size)
    is_offloaded = config.offload_optimizer != "none"

    parameters = width * (total if stage < 3 else -(-total // world_size))
    states = (master + _moment_bytes(config)) * share
    lasting = width * share if stage == 3 else 0
    host = 0
    if config.offload_optimizer == "cpu":
        # ZeRO 1 and 2 copy new parameters through a buffer, and take gradients of several backward calls in one.
        extra = width * (1 + (config.gradient_reduction == "backward" and stage == 2)) if stage < 3 else 0
        host += states + lasting + (master + extra) * share + (width * largest if stage < 3 else 0)
        host += 4 * share if stage < 3 else 0
    elif config.offload_optimizer == "nvme":
        host += lasting + _NUM_OPTIMIZER_BUFFERS * master * min(share, SUB_GROUP_ELEMENTS + largest)
    if config.offload_parameters == "cpu":
        host += parameters
    elif config.offload_parameters == "nvme":
        host += _NUM_PARAMETER_BUFFERS * width * NVME_BUFFER_ELEMENTS

    bucket = width * (config.bucket_bytes // 4)
    return EngineMemory(
        parameters=0 if config.offload_parameters != "none" else parameters,
        optimizer=0 if is_offloaded else states + lasting,
        gradients=_sharded_gradients(trainable, share, config, largest),
        step=0 if is_offloaded else _sharded_step(share, config, master, largest),
        buckets=bucket if stage < 3 else 2 * bucket + 2 * width * largest,
        host=host,
    )


def _sharded_gradients(trainable: int, share: int, config: EngineConfig, largest: int) -> int:
    width, is_offloaded = _width(config), config.offload_optimizer != "none"
    if config.zero_stage == 1 or config.gradient_reduction == "step":
        if config.zero_stage == 3:
            return width * (trainable + largest)
        # Reduced gradients go into a flat buffer while the whole ones are still there.
        return width * (trainable + (4 * largest if is_offloaded else share))
    if config.zero_stage == 3:
        return 2 * width * largest
    return width * (share + 4 * largest if is_offloaded else 2 * share + 2 * largest)


def _sharded_step(share: int, config: EngineConfig, master: int, largest: int) -> int:
    width = _width(config)
    if config.zero_stage == 3:
        elements = min(share, SUB_GROUP_ELEMENTS + largest)
        flattened = width + (master if master != width else 0)
        return max(flattened, 3 * master if config.optimizer == "adamw" else 0) * elements
    flattened = 2 * width + (master if master != width else 0)
    return max(flattened, width + 3 * master if config.optimizer == "adamw" else 0) * share


def _width(config: EngineConfig) -> int:
    return 2 if config.precision == "bf16" else 4


def _moment_bytes(config: EngineConfig) -> int:
    """Both moments of AdamW, per element."""
    if config.optimizer == "adamw_8bit":
        return 2
    return 4 if config.bf16_states else 8
