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
    """Bytes of one rank, without activations. `parameters`, `optimizer` and `buffers` last, the others do not."""

    parameters: int
    optimizer: int  # master weights, both moments, and ZeRO 3's lasting gradients
    buffers: int  # ZeRO 3's buckets, and what gradients go to the host through
    gathered: int  # parameters that are fetched for a layer
    # Of gradients in backward, where each call reduces them; None: whole ones pile up until the last call.
    partial_gradients: int | None
    reduction: int  # gradients and their copies after the last backward call
    update: int  # gradients that are left, and temporaries
    host: int  # everything offloaded, with its buffers

    @property
    def resident(self) -> int:
        """Device bytes between two steps."""
        return self.parameters + self.optimizer + self.buffers


def state_bytes(
    num_parameters: int,
    num_trainable: int,
    config: EngineConfig,
    world_size: int,
    largest_parameter: int = 0,
    layer: int = 0,
) -> EngineMemory:
    """Bytes on one rank of `world_size`, for a module of that many elements.

    `largest_parameter` is the number of elements of the largest one: some temporaries have its size, which
    matters where an embedding makes up a good part of the model. `layer` is that of the largest layer, which ZeRO 3
    fetches as a whole.
    """
    if config.backend == "plain":
        return _plain(num_parameters, num_trainable, config, largest_parameter)
    if config.zero_stage == 0:
        return _zero_0(num_parameters, num_trainable, config, largest_parameter)
    return _sharded(num_parameters, num_trainable, config, world_size, largest_parameter, layer)


def _plain(total: int, trainable: int, config: EngineConfig, largest: int) -> EngineMemory:
    width = _width(config)
    return EngineMemory(
        parameters=width * total,
        optimizer=(4 + _moment_bytes(config)) * trainable,  # a copy of the parameters in fp32 too
        buffers=0,
        gathered=0,
        partial_gradients=None,
        reduction=width * (trainable + largest),
        update=4 * trainable + 16 * largest,  # the norm squares one gradient in fp64
        host=0,
    )


def _zero_0(total: int, trainable: int, config: EngineConfig, largest: int) -> EngineMemory:
    width = _width(config)
    masters = 4 if width == 2 else 0
    return EngineMemory(
        parameters=width * total,
        optimizer=(masters + _moment_bytes(config)) * trainable,
        buffers=0,
        gathered=0,
        partial_gradients=None,
        reduction=2 * width * trainable,  # reduced in a flat copy
        update=(width + masters) * trainable + (8 * largest if config.optimizer == "adamw" else 0),
        host=0,
    )


def _sharded(
    total: int, trainable: int, config: EngineConfig, world_size: int, largest: int, layer: int
) -> EngineMemory:
    width, stage = _width(config), config.zero_stage
    master = 2 if config.bf16_states else 4
    share = -(-trainable // world_size)
    is_offloaded = config.offload_optimizer != "none"
    bucket = width * (config.bucket_bytes // 4)
    reduces_often = stage > 1 and config.gradient_reduction == "backward"

    parameters = width * (total if stage < 3 else -(-total // world_size))
    states = (master + _moment_bytes(config)) * share
    lasting = width * share if stage == 3 else 0
    host = 0
    if config.offload_optimizer == "cpu":
        # ZeRO 1 and 2 copy new parameters through a buffer, and take gradients of several backward calls in one.
        extra = width * (1 + reduces_often) if stage < 3 else 0
        host += states + lasting + (master + extra) * share + (width * largest if stage < 3 else bucket)
        host += 4 * share if stage < 3 else 0
    elif config.offload_optimizer == "nvme":
        host += lasting + _NUM_OPTIMIZER_BUFFERS * master * min(share, SUB_GROUP_ELEMENTS + largest)
    if config.offload_parameters == "cpu":
        host += parameters
    elif config.offload_parameters == "nvme":
        host += _NUM_PARAMETER_BUFFERS * width * NVME_BUFFER_ELEMENTS

    copies = 4 * largest if is_offloaded else share
    return EngineMemory(
        parameters=0 if config.offload_parameters != "none" else parameters,
        optimizer=0 if is_offloaded else states + lasting,
        buffers=_buffers(config, bucket, largest),
        gathered=width * layer if stage == 3 else 0,
        partial_gradients=_partial_gradients(share, config, bucket, largest) if reduces_often else None,
        # Reduced gradients go into a flat buffer while the whole ones are still there.
        reduction=0
        if reduces_often
        else width * (trainable + largest if stage == 3 else trainable + copies) + bucket,
        update=_sharded_update(trainable, share, config, master, largest),
        host=host,
    )


def _buffers(config: EngineConfig, bucket: int, largest: int) -> int:
    is_offloaded = config.offload_optimizer != "none"
    if config.zero_stage == 3:
        return bucket * (1 if is_offloaded else 2)  # one of the two lies where the optimizer does
    return _width(config) * largest if is_offloaded else 0  # gradients on their way to the host


def _partial_gradients(share: int, config: EngineConfig, bucket: int, largest: int) -> int:
    if config.zero_stage == 3:
        return 0
    return bucket + (0 if config.offload_optimizer != "none" else _width(config) * (2 * share + largest))


def _sharded_update(trainable: int, share: int, config: EngineConfig, master: int, largest: int) -> int:
    width, stage = _width(config), config.zero_stage
    if config.offload_optimizer != "none":
        return 0 if stage == 3 else width * trainable
    flattened = width + (master if master != width else 0)
    if stage == 3:
        elements = min(share, SUB_GROUP_ELEMENTS + largest)
        return max(flattened, 3 * master if config.optimizer == "adamw" else 0) * elements
    kept = width * (2 if stage == 2 and config.gradient_reduction == "backward" else 1)
    return max(kept + flattened, width + 3 * master if config.optimizer == "adamw" else 0) * share


def moment_bytes(num_trainable: int, config: EngineConfig, world_size: int) -> int:
    """Of this, what the first update brings to the device: both moments of AdamW."""
    if config.offload_optimizer != "none":
        return 0
    is_sharded = config.backend == "deepspeed" and config.zero_stage > 0
    return _moment_bytes(config) * (-(-num_trainable // world_size) if is_sharded else num_trainable)


def _width(config: EngineConfig) -> int:
    return 2 if config.precision == "bf16" else 4


def _moment_bytes(config: EngineConfig) -> int:
    """Both moments of AdamW, per element."""
    if config.optimizer == "adamw_8bit":
        return 2
    return 4 if config.bf16_states else 8
