"""What a stage takes in device and host memory with given settings: the step rehearsed on the meta device, and what
the engine holds.
"""

from typing import Literal, NamedTuple

from infra.config import EngineConfig
from infra.engine_memory import EngineMemory, state_bytes
from jobs.step_memory import StepTrace
from model.config import ModelConfig

# What CUDA's libraries of matrix products work in, measured on an H200: it lasts from the first product on (its size is
# set in `infra.runtime`), and in a step come some more. Smaller GPUs take less.
_LASTING_WORKSPACE, _PASSING_WORKSPACE = 32 * 2**20, 64 * 2**20

Moment = Literal["backward", "reduction", "update"]


class Prediction(NamedTuple):
    """Bytes of one rank's device at the worst moment of a step, and of the host."""

    moment: Moment
    parameters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    workspace: int  # buckets of reductions, gathered parameters, temporaries of the update, a GPU's libraries
    host: int  # all that is offloaded, activations too

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


def predict(trace: StepTrace, engine: EngineMemory, on_gpu: bool = False) -> Prediction:
    """The worst of a step's moments."""
    lasting_workspace = engine.buffers + (_LASTING_WORKSPACE if on_gpu else 0)
    if engine.partial_gradients is None:
        step, gradients = trace.with_gradients, trace.with_gradients.gradients
    else:
        step, gradients = trace.without_gradients, engine.partial_gradients
    lasting, host = (engine.parameters, engine.optimizer), engine.host + trace.host
    in_backward = lasting_workspace + engine.gathered + (_PASSING_WORKSPACE if on_gpu else 0)
    moments = (
        Prediction("backward", *lasting, gradients, step.activations, step.logits, in_backward, host),
        Prediction("reduction", *lasting, engine.reduction, 0, 0, lasting_workspace, host),
        Prediction("update", *lasting, 0, 0, 0, lasting_workspace + engine.update, host),
    )
    return max(moments, key=lambda moment: moment.total)


def engine_memory(model: ModelConfig, config: EngineConfig, world_size: int) -> EngineMemory:
    """What the engine holds for this model, all of whose parameters are trained."""
    total = model.num_parameters()
    return state_bytes(
        total, total, config, world_size, model.largest_parameter(), model.video.layer_parameters()
    )
