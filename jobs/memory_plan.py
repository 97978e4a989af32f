"""What a stage takes in device and host memory with given settings: the step rehearsed under fake tensors, and what
the engine holds.
"""

from typing import Literal, NamedTuple

from infra.config import EngineConfig
from infra.engine_memory import EngineMemory, state_bytes
from jobs.step_memory import StepTrace
from model.config import ModelConfig

Moment = Literal["backward", "reduction", "update"]


class Prediction(NamedTuple):
    """Bytes of one rank's device at the worst moment of a step, and of the host."""

    moment: Moment
    parameters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    workspace: int  # buckets of reductions, gathered parameters, temporaries of the update
    host: int  # all that is offloaded

    @property
    def total(self) -> int:
        return (
            self.parameters
            + self.optimizer
            + self.gradients
            + self.activations
            + self.logits
            + self.workspace
        )


def predict(trace: StepTrace, engine: EngineMemory, reduces_often: bool) -> Prediction:
    """The worst of a step's moments. `reduces_often`: gradients leave the device's memory, or shrink to a part, at
    every backward call; else whole ones pile up until the last.
    """
    step = trace.without_gradients if reduces_often else trace.with_gradients
    gradients = engine.gradients if reduces_often else step.gradients
    common = engine.parameters, engine.optimizer
    moments = (
        Prediction(
            "backward", *common, gradients, step.activations, step.logits, engine.buckets, engine.host
        ),
        Prediction("reduction", *common, engine.gradients, 0, 0, engine.buckets, engine.host),
        Prediction("update", *common, 0, 0, 0, engine.step + engine.buckets, engine.host),
    )
    return max(moments, key=lambda moment: moment.total)


def reduces_often(config: EngineConfig) -> bool:
    """Whether the engine keeps no whole gradients between backward calls."""
    return (
        config.backend == "deepspeed" and config.zero_stage >= 2 and config.gradient_reduction == "backward"
    )


def engine_memory(model: ModelConfig, config: EngineConfig, world_size: int) -> EngineMemory:
    """What the engine holds for this model, all of whose parameters are trained."""
    total = model.num_parameters()
    return state_bytes(total, total, config, world_size, model.largest_parameter())
