"""One optimizer step: a batch becomes losses becomes a weight update."""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from infra.engine import Engine
from model.step_key import StepKey
from pipeline.loader import Batch

# SViTT takes BEiT's normalisation: pixels scaled to [0, 1], mean and standard deviation 0.5.
PIXEL_MIDDLE = 127.5


def normalise(
    video_BTCHW: UInt8[Tensor, "B T C H W"], device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "B T C H W"]:
    """uint8 pixels to [-1, 1] on the device; only bytes cross to it."""
    return (video_BTCHW.to(device, non_blocking=True).float() / PIXEL_MIDDLE - 1).to(dtype)


class TrainStep:
    """Computes the losses of this rank's part of a global batch and updates the weights.

    The contrastive loss sees the features of all ranks. Every draw of the step is a function of
    (seed, step, rank), so a repeated step repeats exactly.
    """

    def __init__(
        self, engine: Engine, seed: int, rank: int, learning_rate_at: Callable[[int], float]
    ) -> None:
        self.engine, self.seed, self.rank, self.learning_rate_at = engine, seed, rank, learning_rate_at

    def __call__(self, step: int, batch: Batch) -> Float[Tensor, " metrics"]:
        """Returns loss, vtc, vtm, mlm and the gradient norm, detached, in the order of StepMetrics."""
        engine, device = self.engine, self.engine.device
        terms = engine.module(
            normalise(batch.video_BTCHW, device, engine.dtype),
            batch.text_ids_BL.to(device),
            batch.text_mask_BL.to(device),
            batch.verbs_BV.to(device),
            batch.nouns_BU.to(device),
            StepKey(self.seed, step, self.rank),
            batch.index_B.to(device),
        )
        engine.backward(terms.total)
        engine.step(self.learning_rate_at(step))
        losses = torch.stack([terms.total, terms.vtc, terms.vtm, terms.mlm]).detach().float()
        return torch.cat([losses, losses.new_tensor([engine.grad_norm or 0.0])])
