"""Position tables for other frame counts, and strict loading."""

import pytest
import torch

from model.config import ModelConfig
from model.errors import WeightsError
from model.video_text_model import VideoTextModel
from model.weights import inflate_bias_table, inflate_time_embedding, load_for_num_frames

CONFIG = ModelConfig.named("tiny").replaced(
    video={"image_size": 32, "block_size": 2, "position_init": "normal"}
)


def _offsets(num_frames: int) -> torch.Tensor:
    """A table of one spatial offset that holds its own time offset, and -7, -8, -9 for CLS."""
    time = torch.arange(-(num_frames - 1), num_frames, dtype=torch.float32)
    return torch.cat([time, torch.tensor([-7.0, -8.0, -9.0])])[:, None]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (4, 8, [-3, -3, -3, -2, -2, -1, -1, 0, 0, 1, 1, 2, 2, 3, 3]),
        (2, 4, [-1, -1, -1, 0, 0, 1, 1]),
        (8, 4, [-7, -5, -3, -1, 1, 3, 5]),
        (1, 4, [0] * 7),
    ],
)
def test_nearest_rule_by_hand(old: int, new: int, expected: list[int]) -> None:
    out = inflate_bias_table(_offsets(old), old, new)[:, 0].tolist()
    assert out[-3:] == [-7, -8, -9]
    assert out[:-3] == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (4, 8, [-3, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3]),
        (8, 4, [-6, -4, -2, 0, 2, 4, 6]),
        (1, 4, [0] * 7),
        (4, 4, [-3, -2, -1, 0, 1, 2, 3]),
        (4, 1, [0]),
    ],
)
def test_interpolation_keeps_zero_and_is_symmetric(old: int, new: int, expected: list[float]) -> None:
    out = inflate_bias_table(_offsets(old), old, new, "interpolate")[:, 0].tolist()
    assert out[-3:] == [-7, -8, -9]
    assert out[:-3] == pytest.approx(expected)


def test_a_table_of_another_frame_count_is_refused() -> None:
    with pytest.raises(WeightsError, match="not one of 3 frames"):
        inflate_bias_table(_offsets(4), 3, 8)


def test_weights_of_fewer_frames_are_inflated_and_the_rest_taken() -> None:
    torch.manual_seed(0)
    source = VideoTextModel(CONFIG)
    target = VideoTextModel(
        CONFIG.replaced(video={"num_frames": 8, "keep_rate": 0.6, "num_random_blocks": 5})
    )
    report = load_for_num_frames(target, source.state_dict())
    assert len(report.inflated) == 6
    assert not report.new
    assert not report.unused
    assert len(report.matched) + 6 == len(target.state_dict())
    name = "video_encoder.layers.2.attention.bias_table"
    assert torch.equal(target.state_dict()[name], inflate_bias_table(source.state_dict()[name], 4, 8))
    assert torch.equal(target.vtm_head.weight, source.vtm_head.weight)
    assert report.summary() == f"{len(report.matched)} keys matched, 6 inflated, 0 new, 0 unused"


def test_what_does_not_fit_is_named_and_nothing_is_changed() -> None:
    torch.manual_seed(0)
    model = VideoTextModel(CONFIG)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = dict(VideoTextModel(CONFIG).state_dict())
    state["vtm_head.weight"] = torch.zeros(3, 96)
    state["surplus"] = torch.zeros(1)
    state["video_encoder.layers.0.attention.bias_table"] = torch.zeros(10, 4)
    del state["text_projection.bias"]
    with pytest.raises(WeightsError) as caught:
        load_for_num_frames(model, state)
    for words in (
        "vtm_head.weight: shape (3, 96), the model has (2, 96)",
        "surplus: not part",
        "text_projection.bias: missing",
        "bias_table: shape (10, 4)",
        "4 problems",
    ):
        assert words in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_new_and_unused_keys_pass_only_when_allowed() -> None:
    model = VideoTextModel(CONFIG)
    state = dict(model.state_dict())
    state["surplus"] = torch.zeros(1)
    del state["text_projection.bias"]
    report = load_for_num_frames(model, state, allow_new=True, allow_unused=True)
    assert report.new == ("text_projection.bias",)
    assert report.unused == ("surplus",)


def test_new_keys_may_be_allowed_by_prefix() -> None:
    model = VideoTextModel(CONFIG)
    state = {
        key: value for key, value in model.state_dict().items() if not key.startswith("text_projection.")
    }
    assert len(load_for_num_frames(model, state, allow_new=("text_projection.",)).new) == 2
    with pytest.raises(WeightsError, match=r"text_projection\.bias: missing"):
        load_for_num_frames(model, state, allow_new=("vtm_head.",))


def test_a_learned_temperature_is_optional_either_way() -> None:
    fixed, learned = VideoTextModel(CONFIG), VideoTextModel(CONFIG.replaced(learn_temperature=True))
    assert load_for_num_frames(learned, fixed.state_dict()).new == ("learned_temperature",)
    assert load_for_num_frames(fixed, learned.state_dict()).unused == ("learned_temperature",)


def test_time_embeddings_grow_between_the_middles_of_their_frames() -> None:
    embedding = torch.tensor([[0.0], [4.0]])
    # Middles of 4 parts lie at -0.25, 0.25, 0.75, 1.25 of the two old frames; the ends are held.
    assert inflate_time_embedding(embedding, 4).tolist() == [[0.0], [1.0], [3.0], [4.0]]
    assert inflate_time_embedding(embedding, 2).tolist() == embedding.tolist()


def test_a_model_with_absolute_positions_loads_at_another_number_of_frames() -> None:
    config = CONFIG.replaced(video={"absolute_position_std": 1.0})
    longer = config.replaced(video={"num_frames": 2 * config.video.num_frames})
    model = VideoTextModel(config)
    report = load_for_num_frames(target := VideoTextModel(longer), model.state_dict(), "interpolate")
    assert "video_encoder.time_embedding" in report.inflated
    assert torch.equal(target.video_encoder.place_embedding, model.video_encoder.place_embedding)
    assert sum(p.numel() for p in target.parameters()) == longer.num_parameters()
