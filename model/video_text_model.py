"""Video-text model of SViTT-Ego (arXiv 2406.09462): two encoders, fusion layers, and the heads of its losses."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from model.blocks import NORM_EPS
from model.config import ModelConfig
from model.recompute import OnHost
from model.row_draws import RowDraws
from model.sparsity import EdgeLayout
from model.text_encoder import Fused, TextEncoder
from model.video_encoder import VideoEncoder

Result = TypeVar("Result")


class VideoOutput(NamedTuple):
    """Normed surviving tokens for the fusion layers, unit-norm features, and what each pruning kept."""

    tokens_BMD: Float[Tensor, "B M D"]
    features_BP: Float[Tensor, "B P"]
    keep_indices: tuple[Int[Tensor, "B m"], ...]


class TextOutput(NamedTuple):
    """Token states for the fusion layers and unit-norm features."""

    states_BLD: Float[Tensor, "B L D"]
    features_BP: Float[Tensor, "B P"]


class VideoTextModel(nn.Module):
    """Dual encoder with fusion: `encode_video`, `encode_text`, `fuse`, and the heads. Losses stand in `objective`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.video_encoder = VideoEncoder(config.video)
        self.video_norm = nn.LayerNorm(config.video.width, eps=NORM_EPS)
        self.text_encoder = TextEncoder(config)
        self.video_projection = nn.Linear(config.video.width, config.joint_width)
        self.text_projection = nn.Linear(config.text.width, config.joint_width)
        self.vtm_head = nn.Linear(config.text.width, 2)
        # Shape (1,): sharded optimizers refuse parameters without an axis. A fixed one is no parameter.
        self.learned_temperature = (
            nn.Parameter(torch.full((1,), config.temperature)) if config.learn_temperature else None
        )

    def encode_video(
        self,
        video_BTCHW: Float[Tensor, "B T 3 H W"],
        edge_seed: int | None = None,
        layouts: Sequence[EdgeLayout | None] | None = None,
        draws: RowDraws | None = None,
    ) -> VideoOutput:
        """Encode normalised clips; `edge_seed` None means the fixed edges of evaluation, `draws` None no drop path."""
        encoding = self.video_encoder(video_BTCHW, edge_seed, layouts, draws)
        features_BP = _unit(self.video_projection(encoding.pooled_BD))
        return VideoOutput(self.video_norm(encoding.tokens_BMD), features_BP, encoding.keep_indices)

    def encode_text(
        self,
        text_ids_BL: Int[Tensor, "B L"],
        text_mask_BL: Bool[Tensor, "B L"],
        draws: RowDraws | None = None,
    ) -> TextOutput:
        """Encode captions, without dropout unless `draws` are given; the feature is read at [CLS]."""
        states_BLD = self.text_encoder(text_ids_BL, text_mask_BL, draws)
        return TextOutput(states_BLD, _unit(self.text_projection(states_BLD[:, 0])))

    def fuse(
        self,
        states_QLD: Float[Tensor, "Q L D"],
        text_mask_QL: Bool[Tensor, "Q L"],
        video_tokens_BMD: Float[Tensor, "B M D"],
        clip_Q: Int[Tensor, " Q"] | None = None,
        seed: int | None = None,
        draws: RowDraws | None = None,
    ) -> Fused:
        """Fusion layers over pairs (text row q, video row clip_Q[q]); `seed` is that of random pruning."""
        return self.text_encoder.fuse(states_QLD, text_mask_QL, video_tokens_BMD, clip_Q, seed, draws)

    def matching_logits(self, states_QLD: Float[Tensor, "Q L D"]) -> Float[Tensor, "Q 2"]:
        """Scores of (no match, match) of fused pairs."""
        return self.vtm_head(states_QLD[:, 0])

    def temperature(self) -> Float[Tensor, " 1"]:
        """What cosines are divided by, float32, within `temperature_range`."""
        if self.learned_temperature is None:
            # The device of a buffer: ZeRO 3 takes a parameter that is touched here for one that this module computes
            # with, and fails where its list of them has changed since it recorded the order of calls.
            codes: Tensor = self.video_encoder.codes  # pyright: ignore[reportAssignmentType]
            return torch.full((1,), self.config.temperature, device=codes.device)
        learned = self.learned_temperature.float()
        # The value is clamped, the gradient passes, so that a temperature at the border can come back.
        return learned + (learned.clamp(*self.config.temperature_range) - learned).detach()

    def offload_within(self, on_host: OnHost) -> None:
        """Offloaded activations are allocated within `on_host()` from now on: for a budget that counts host memory."""
        for encoder in (self.video_encoder, self.text_encoder):
            encoder.run_layer.on_host = on_host

    def forward(self, part: Callable[..., Result], *arguments: Any) -> Result:
        """`part(self, *arguments)`: any computation of the model as one call of the module.

        Engines that shard parameters put them together around calls of the module and of its layers, so a training
        step goes through here.
        """
        return part(self, *arguments)


def _unit(projected: Tensor) -> Tensor:
    return functional.normalize(projected.float(), dim=-1)
