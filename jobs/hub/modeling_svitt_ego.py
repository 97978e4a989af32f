"""An exported SViTT-Ego for transformers: `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from jobs.hub.configuration_svitt_ego import SvittEgoConfig
from model.attention import token_codes
from model.config import ModelConfig
from model.token_order import token_order
from model.video_encoder import VideoEncoder
from model.video_text_model import VideoTextModel


@dataclass
class SvittEgoOutput(ModelOutput):
    """Unit features of what was given, (B, D) each, and cosines of all texts (rows) with all videos if both were."""

    text_features: Tensor | None = None
    video_features: Tensor | None = None
    similarity: Tensor | None = None


class SvittEgoModel(PreTrainedModel):
    """`encode_video` and `encode_text` give unit features of one space; their dot product says what fits what.

    `model` is the whole network with its fusion layers and heads.
    """

    config_class = SvittEgoConfig
    # Weights are stored under the names of the network itself, without this prefix.
    base_model_prefix = "model"

    def __init__(self, config: SvittEgoConfig) -> None:
        super().__init__(config)
        self.model = VideoTextModel(ModelConfig(**config.config))
        self.post_init()

    def encode_video(self, pixel_values: Tensor) -> Tensor:
        """Clips (B, T, 3, H, W), uint8 pixels, or floating point already scaled to [-1, 1], to features (B, D).

        T, H and W are those of preprocessor_config.json. Raises ModelInputError for others.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = pixel_values.float() / 127.5 - 1
        return self.model.encode_video(pixel_values).features_BP

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, L) and their mask, nonzero at tokens, to features (B, D); without a mask all count."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.model.encode_text(input_ids, mask.bool()).features_BP

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> SvittEgoOutput:
        """Features of clips, of texts, or of both and their cosines. Arguments as the two encoders take them."""
        text = None if input_ids is None else self.encode_text(input_ids, attention_mask)
        video = None if pixel_values is None else self.encode_video(pixel_values)
        similarity = None if text is None or video is None else text @ video.T
        return SvittEgoOutput(text_features=text, video_features=video, similarity=similarity)

    def tie_weights(self, *arguments: Any, **options: Any) -> None:
        """The head for hidden words shares the matrix of the word embeddings, which is stored once."""
        super().tie_weights(*arguments, **options)
        text = self.model.text_encoder
        text.mlm_head.decoder.weight = text.embeddings.word_embeddings.weight  # pyright: ignore

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers builds models without storage and fills in what is stored. These tensors are not, they follow
        # from the settings.
        if isinstance(module, VideoEncoder):
            video = module.config
            module.codes.copy_(token_codes(video.num_frames, video.grid, video.grid))  # pyright: ignore
            module.order.copy_(token_order(video))  # pyright: ignore
