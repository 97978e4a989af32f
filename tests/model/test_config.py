"""Sizes and costs against the published figures, and settings that must be refused."""

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig, VideoConfig
from model.cost import keep_count, video_parameters
from model.named_sizes import NAMED_SIZES
from model.video_encoder import VideoEncoder
from model.video_text_model import VideoTextModel


def _base(num_frames: int, keep_rate: float = 0.7, num_random: int | None = 3) -> VideoConfig:
    return VideoConfig(num_frames=num_frames, keep_rate=keep_rate, num_random_blocks=num_random)


@pytest.mark.parametrize(
    ("num_frames", "keep_rate", "tokens", "blocks"),
    [
        (1, 0.7, (196, 138, 97, 68), (4, 3, 2, 2)),
        (2, 0.7, (392, 275, 193, 136), (7, 5, 4, 3)),
        (4, 0.7, (784, 549, 385, 270), (14, 10, 7, 5)),
        (4, 0.6, (784, 471, 283, 170), (14, 9, 6, 4)),
        (8, 0.7, (1568, 1098, 769, 539), (28, 20, 14, 10)),
        (8, 0.6, (1568, 941, 565, 339), (28, 17, 11, 7)),
        (16, 0.7, (3136, 2196, 1538, 1077), (56, 40, 28, 20)),
        (16, 0.6, (3136, 1882, 1130, 678), (56, 34, 21, 13)),
    ],
)
def test_tokens_and_blocks_are_the_published_ones(
    num_frames: int, keep_rate: float, tokens: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    config = _base(num_frames, keep_rate)
    by_layer = config.tokens_by_layer()
    assert (by_layer[0], by_layer[4], by_layer[7], by_layer[10]) == tokens
    assert by_layer[3] == tokens[0]
    assert by_layer[12] == tokens[3]
    assert len(by_layer) == 13
    counts = config.blocks_by_layer()
    assert (counts[0], counts[4], counts[7], counts[10]) == blocks


@pytest.mark.parametrize(
    ("num_random", "keep_rate", "gmacs"),
    [
        (None, 1.0, (78.5, 179.6, 449.7)),
        (None, 0.7, (52.5, 117.0, 282.4)),
        (None, 0.6, (46.4, 103.2, 248.4)),
        (3, 1.0, (70.4, 140.7, 281.4)),
        (5, 1.0, (72.0, 144.0, 287.8)),
        (5, 0.7, (49.8, 99.5, 198.9)),
        (3, 0.7, (48.7, 97.2, 194.3)),
        (3, 0.6, (43.3, 86.3, 172.3)),
    ],
)
def test_video_cost_is_the_counted_one(
    num_random: int | None, keep_rate: float, gmacs: tuple[float, ...]
) -> None:
    for num_frames, expected in zip((4, 8, 16), gmacs, strict=True):
        # The published code counts a block twice where K_r exceeds what is left; its cost is the one published.
        config = _base(num_frames, keep_rate, num_random)
        config = config.model_copy(update={"official_quirks": True})
        assert config.macs() / 1e9 == pytest.approx(expected, abs=0.051)


def test_five_random_blocks_at_the_higher_pruning_cost_the_counted_too() -> None:
    assert _base(8, 0.6, 5).macs() / 1e9 == pytest.approx(88.3, abs=0.051)
    assert _base(16, 0.6, 5).macs() / 1e9 == pytest.approx(176.3, abs=0.051)


def test_clamped_random_blocks_cost_less_than_repeated_ones() -> None:
    clamped = _base(4, 0.7, 5)
    # Layers 10 and 11 have 5 blocks: 5 key blocks instead of 6 for 5 x 56 queries, 768 wide, twice.
    saved = 2 * (2 * 5 * 56 * 56 * 768)
    assert clamped.model_copy(update={"official_quirks": True}).macs() - clamped.macs() == saved


def test_the_cost_is_what_a_flop_counter_counts() -> None:
    torch.manual_seed(0)
    video = {"num_frames": 3, "image_size": 32, "width": 24, "num_heads": 2, "depth": 4, "block_size": 5}
    video |= {"prune_layers": (1,), "num_random_blocks": 1, "official_quirks": True}
    config = ModelConfig().replaced(video=video).video
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        VideoEncoder(config).eval()(torch.zeros(1, 3, 3, 32, 32))
    # Two operations a multiply-accumulate. The formula takes one key of CLS per padded query, as the code does.
    assert counter.get_total_flops() == 2 * config.macs()


def test_text_and_fusion_cost_are_the_counted_ones() -> None:
    base = ModelConfig.named("base")
    costs = base.gmacs_per_clip(text_length=32)
    assert costs.text == pytest.approx(2.05, abs=0.005)
    assert costs.fusion == pytest.approx(1.80, abs=0.005)
    assert costs.training_forward == pytest.approx(costs.video + 2 * costs.text + 4 * costs.fusion)
    pruned = base.replaced(multimodal_keep_rate=0.1, multimodal_prune_layers=(10,))
    assert pruned.gmacs_per_clip(32).fusion == pytest.approx(1.50, abs=0.005)
    pruned = base.replaced(multimodal_keep_rate=0.1)
    assert pruned.gmacs_per_clip(32).fusion == pytest.approx(1.20, abs=0.005)


def test_parameter_count_is_the_published_one_and_that_of_the_module() -> None:
    assert ModelConfig.named("base").num_parameters() / 1e6 == pytest.approx(203.4, abs=0.05)
    config = ModelConfig.named("tiny").replaced(learn_temperature=True, text={"width": 64, "num_heads": 2})
    assert config.num_parameters() == sum(p.numel() for p in VideoTextModel(config).parameters())


def test_keep_count_rounds_up_in_double_precision() -> None:
    assert keep_count(784, 0.7) == 549
    assert keep_count(10, 0.7) == 7
    assert keep_count(1, 0.01) == 1
    assert keep_count(5, 1.0) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 100}, ["100", "16", "96"]),
        ({"keep_rate": 0.0}, ["keep_rate", "greater than 0"]),
        ({"keep_rate": 1.2}, ["keep_rate", "less than or equal to 1"]),
        ({"block_size": 200}, ["block_size 200", "144"]),
        ({"num_local_blocks": 2}, ["num_local_blocks 2", "odd"]),
        ({"num_local_blocks": 0, "num_random_blocks": 0}, ["only CLS"]),
        ({"num_heads": 5}, ["width 96", "num_heads 5"]),
        ({"prune_layers": (3, 6)}, ["prune_layers", "0 to 5"]),
        ({"prune_layers": (3, 1)}, ["ascending"]),
        ({"keep_rates": 0.5}, ["keep_rates"]),
        (
            {"official_quirks": True, "num_random_blocks": 9},
            ["num_random_blocks 9", "6 blocks", "official_quirks"],
        ),
        (
            {"official_quirks": True, "prune_score": "avg_attn"},
            ["avg_attn", "not part of the published code"],
        ),
        ({"recompute": True}, ["recompute", "'none', 'all_but_attention' or 'all'"]),
        ({"offload_activations": True}, ["offload_activations", "recompute none", "set recompute to all"]),
        (
            {"official_quirks": True, "recompute": "all_but_attention"},
            ["official_quirks", "take recompute all"],
        ),
        (
            {"attention_backend": "reference", "recompute": "all_but_attention"},
            ["attention_backend reference", "take recompute all"],
        ),
        ({"prune_score": "attention"}, ["prune_score", "cls_attn", "avg_attn", "random"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(
    change: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.named("tiny").replaced(video=change)
    for word in words:
        assert word in str(caught.value)


def test_text_layers_are_recomputed_whole_or_not_at_all() -> None:
    for mode in (True, "all_but_attention"):
        with pytest.raises(ValidationError, match="'none' or 'all'"):
            ModelConfig.named("tiny").replaced(text={"recompute": mode})
    with pytest.raises(ValidationError, match="set recompute to all"):
        ModelConfig.named("tiny").replaced(text={"offload_activations": True})


def test_pruning_layers_do_not_matter_when_nothing_is_pruned() -> None:
    config = ModelConfig.named("tiny").replaced(video={"keep_rate": 1.0, "prune_layers": (30,)})
    assert set(config.video.tokens_by_layer()) == {144}


def test_losses_that_need_fusion_are_refused_without_fusion_layers() -> None:
    with pytest.raises(ValidationError, match="leaves no fusion layer"):
        ModelConfig.named("tiny").replaced(text={"fusion_layer": 3})
    with pytest.raises(ValidationError, match="nothing to train"):
        ModelConfig.named("tiny").replaced(vtc_weight=0, vtm_weight=0, mlm_weight=0)


@pytest.mark.parametrize(("num_frames", "millions"), [(1, 85.76), (4, 86.39), (8, 87.23)])
def test_the_video_encoder_has_the_published_number_of_parameters(num_frames: int, millions: float) -> None:
    video = ModelConfig.named("base").replaced(video={"num_frames": num_frames, "block_size": 49}).video
    found = video_parameters(
        video.depth, video.width, video.mlp_width, video.num_heads, video.table_rows, 3 * video.patch_size**2
    )
    # Ours counts the norm in front of the fusion layers too.
    assert (found - 2 * video.width) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("name", NAMED_SIZES)
def test_named_sizes_are_whole(name: str) -> None:
    config = ModelConfig.named(name)
    assert config.video.width // config.video.num_heads == config.text.width // config.text.num_heads
    assert len(config.video.tokens_by_layer()) == config.video.depth + 1


@pytest.mark.parametrize("name", ["multimodal_keep_rate", "keep_rate"])
@pytest.mark.parametrize("value", [0, 1.2, -0.5])
def test_keep_rates_outside_of_0_to_1_are_refused(name: str, value: float) -> None:
    change = {"video": {name: value}} if name == "keep_rate" else {name: value}
    with pytest.raises(ValidationError, match=name):
        ModelConfig().replaced(**change)


def test_an_unknown_size_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="large, base, small, tiny"):
        ModelConfig.named("huge")
