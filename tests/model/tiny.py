"""A model of a few thousand parameters and batches for it, for tests of whole passes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.losses import ActionTags
from model.objective import Captions, LossTerms, training_losses
from model.step_key import StepKey
from model.video_text_model import VideoTextModel


def tiny_config(video: dict[str, Any] | None = None, **top: Any) -> ModelConfig:
    """3 frames of 3 x 3 patches (27), blocks of 4 (the last partly filled), pruned to 18 and 12."""
    defaults = {
        "num_frames": 3,
        "image_size": 12,
        "patch_size": 4,
        "width": 16,
        "depth": 4,
        "num_heads": 2,
        "drop_path": 0.0,
        "keep_rate": 0.65,
        "prune_layers": (1, 2),
        "block_size": 4,
        "num_random_blocks": 2,
        "init_std": 0.3,
        "layer_scale_init": 1.0,
        "position_init": "normal",
    }
    text = {
        "vocab_size": 30,
        "width": 16,
        "num_heads": 2,
        "depth": 3,
        "fusion_layer": 1,
        "max_length": 8,
        "dropout": 0.0,
        "init_std": 0.3,
    }
    top = {"joint_width": 8, "multimodal_prune_layers": (1,), **top}
    return ModelConfig().replaced(
        video={**defaults, **(video or {})}, text={**text, **top.pop("text", {})}, **top
    )


class TinyBatch(NamedTuple):
    """What the training losses look at."""

    video: Tensor
    text_ids: Tensor
    text_mask: Tensor
    verbs: Tensor
    nouns: Tensor
    clip_index: Tensor

    def losses(self, model: VideoTextModel, key: StepKey) -> LossTerms:
        """The objective of this batch."""
        captions = Captions(self.text_ids, self.text_mask, self.clip_index)
        return training_losses(
            model, self.video, captions, ActionTags(self.verbs, self.nouns, self.clip_index), key
        )

    def rows(self, where: slice) -> "TinyBatch":
        """Part of the batch."""
        return TinyBatch(*(part[where] for part in self))


def tiny_batch(config: ModelConfig, num_clips: int = 6, seed: int = 0) -> TinyBatch:
    """Random clips and captions of 3 to 7 tokens; clips 0 and 1 share verb and noun."""
    generator = torch.Generator().manual_seed(seed)
    video, side = config.video, config.video.image_size
    lengths = torch.arange(num_clips) % 5 + 3
    mask = torch.arange(8) < lengths[:, None]
    ids = torch.randint(5, config.text.vocab_size, (num_clips, 8), generator=generator).where(mask, 0)
    ids[:, 0] = config.text.cls_id
    tags = torch.eye(num_clips, dtype=torch.bool)
    tags[1] = tags[0]
    clips = torch.randn(num_clips, video.num_frames, 3, side, side, generator=generator)
    return TinyBatch(clips, ids, mask, tags, tags, torch.arange(num_clips))
