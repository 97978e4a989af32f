"""Decay groups and schedule."""

import pytest

from model.config import ModelConfig
from model.optim import decays, lr_factor, parameter_groups
from model.video_text_model import VideoTextModel


def test_only_matrices_of_linear_maps_decay() -> None:
    model = VideoTextModel(ModelConfig.named("tiny").replaced(learn_temperature=True))
    groups = parameter_groups(model, 0.02)
    assert [group["weight_decay"] for group in groups] == [0.02, 0.0]
    named = dict(model.named_parameters())
    decayed = {name for name, parameter in named.items() if decays(name, parameter)}
    assert "video_encoder.layers.0.attention.qkv_weight" in decayed
    assert "video_encoder.patch_embed.weight" in decayed
    assert "text_encoder.layers.2.crossattention.self.key.weight" in decayed
    for name in named.keys() - decayed:
        assert (
            named[name].dim() == 1 or "bias_table" in name or "_embeddings" in name or "cls_token" in name
        ), name
    assert not decayed & {"learned_temperature", "video_encoder.cls_token"}
    count = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert count == model.config.num_parameters()


def test_schedule_by_hand() -> None:
    factors = [lr_factor(step, total_steps=14, warmup_steps=4, floor=0.1) for step in (0, 1, 4, 9, 14, 99)]
    assert factors == pytest.approx([0.1, 0.25, 1.0, 0.5, 0.1, 0.1])


def test_schedule_is_clipped_at_the_floor_and_not_rescaled() -> None:
    assert lr_factor(5, 10, 0, 0.4) == pytest.approx(0.5)
    assert lr_factor(8, 10, 0, 0.4) == 0.4


def test_schedule_without_warmup_starts_at_the_peak_and_bad_lengths_are_refused() -> None:
    assert lr_factor(0, 10, 0, 0.0) == 1
    with pytest.raises(ValueError, match="warmup_steps 11"):
        lr_factor(0, 10, 11, 0.0)
