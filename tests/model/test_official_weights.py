"""Published key names and settings, to ours and back."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model import ModelConfig, VideoTextModel, WeightsError, load_official_svitt
from model.official_weights import from_official, settings_from_official, to_official
from tests.model.tiny import tiny_config

GOLDEN = Path(__file__).parents[1] / "golden" / "svitt"
TEXT = {"num_heads": 4, "cls_id": 1, "mask_id": 3}
BLOCKS = {"block_size": 4}


def _golden_state() -> dict[str, Tensor]:
    return {**load_file(GOLDEN / "weights.safetensors"), **load_file(GOLDEN / "tables_T2.safetensors")}


def _derived(key: str) -> bool:
    return key.endswith(("relative_position_index", "position_ids", "decoder.weight", "decoder.bias"))


def test_published_weights_come_back_unchanged() -> None:
    state = {key: value for key, value in _golden_state().items() if not _derived(key)}
    back = to_official(from_official(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_a_model_of_the_published_depth_has_the_published_number_of_entries() -> None:
    config = tiny_config(
        {"depth": 12, "prune_layers": (3, 6, 9)},
        text={"depth": 12, "fusion_layer": 9},
        multimodal_prune_layers=(9,),
        learn_temperature=True,
    )
    # 477, less 12 index buffers, position ids, and the tied decoder's matrix and bias.
    assert len(to_official(VideoTextModel(config).state_dict())) == 477 - 12 - 1 - 2


def test_sizes_are_read_from_the_weights() -> None:
    model, report = load_official_svitt(_golden_state(), video=BLOCKS, text=TEXT)
    video, text = model.config.video, model.config.text
    assert (video.num_frames, video.image_size, video.patch_size) == (2, 64, 16)
    assert (video.width, video.depth, video.num_heads, video.mlp_width) == (48, 12, 4, 96)
    assert (text.vocab_size, text.width, text.depth, text.fusion_layer) == (200, 48, 12, 9)
    assert (text.max_length, text.mlp_width, model.config.joint_width) == (32, 96, 16)
    assert model.config.learn_temperature
    assert video.official_quirks
    assert not model.training
    assert report.summary().endswith("0 inflated, 0 new, 0 unused")


def test_another_number_of_frames_inflates_the_tables() -> None:
    model, report = load_official_svitt(_golden_state(), video={**BLOCKS, "num_frames": 4}, text=TEXT)
    assert model.config.video.num_frames == 4
    assert len(report.inflated) == 12


def test_the_image_size_is_asked_for_where_no_index_tells_it() -> None:
    state = _golden_state()
    del state["relative_position_index"]
    with pytest.raises(WeightsError, match=r"150 rows .* 224 px .*2 frames of 64 px.* state image_size"):
        load_official_svitt(state, video=BLOCKS, text=TEXT)
    model = load_official_svitt(state, image_size=64, video=BLOCKS, text=TEXT).model
    assert model.config.video.num_frames == 2
    with pytest.raises(WeightsError, match="for frames of 64 px, image_size says 32"):
        load_official_svitt(_golden_state(), image_size=32, video=BLOCKS, text=TEXT)


def test_what_shapes_do_not_tell_is_asked_for() -> None:
    with pytest.raises(WeightsError, match=r"num_heads, cls_id, mask_id cannot be read .* text="):
        load_official_svitt(_golden_state(), video=BLOCKS)


def _retrieval(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.replace("text_encoder.bert.", "text_encoder."): value
        for key, value in state.items()
        if not key.startswith("text_encoder.cls.")
    }


def test_a_retrieval_checkpoint_loads_and_reports_the_head_it_lacks() -> None:
    state = _retrieval(_golden_state())
    model, report = load_official_svitt(state, video=BLOCKS, text=TEXT)
    assert report.new
    assert all(key.startswith("text_encoder.mlm_head.") for key in report.new)
    words = model.text_encoder.embeddings.word_embeddings.weight
    assert torch.equal(words, state["text_encoder.embeddings.word_embeddings.weight"])


def test_prefixes_of_parallel_training_and_old_norm_names_are_understood() -> None:
    state = {
        "module."
        + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in _golden_state().items()
    }
    report = load_official_svitt({"model": state}, video=BLOCKS, text=TEXT).report
    assert not report.new + report.unused


def test_what_does_not_fit_is_named_with_its_shape() -> None:
    state = _golden_state()
    state["momentum_queue"] = torch.zeros(1)
    state["itm_head.weight"] = torch.zeros(3, 48)
    del state["text_proj.bias"]
    with pytest.raises(WeightsError) as caught:
        load_official_svitt(state, video=BLOCKS, text=TEXT)
    for words in (
        "momentum_queue: not part of this model",
        "vtm_head.weight: shape (3, 48), the model has (2, 48)",
        "text_projection.bias: missing",
    ):
        assert words in str(caught.value)
    with pytest.raises(WeightsError, match="layer 0 of the video encoder has only"):
        from_official({"vision_encoder.encoder.layer.0.attention.attention.key.weight": torch.zeros(4, 4)})


def test_surplus_keys_are_reported_when_allowed() -> None:
    state = {**_golden_state(), "momentum_queue": torch.zeros(1)}
    report = load_official_svitt(state, video=BLOCKS, text=TEXT, allow_unused=True).report
    assert report.unused == ("momentum_queue",)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["text_decoder.bert.embeddings.LayerNorm.weight"], "keys are those of SViTT question answering"),
        (
            ["beit.embeddings.patch_embeddings.projection.weight", "x.relative_position_bias_table"],
            "load_hf_beit",
        ),
        (["bert.embeddings.word_embeddings.weight"], "load_hf_bert"),
        (["video_encoder.cls_token"], "load_model"),
        (["vit.embeddings.patch_embeddings.projection.weight"], "another image model"),
        (["visual.conv1.weight"], "no family known here .such as visual.conv1.weight"),
    ],
)
def test_checkpoints_of_other_families_are_refused_with_the_loader_to_use(
    keys: list[str], words: str
) -> None:
    with pytest.raises(WeightsError, match=f"not a checkpoint of SViTT.*{words}"):
        load_official_svitt({key: torch.zeros(1) for key in keys})


def test_values_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"not tensors: epoch \(int\)"):
        load_official_svitt({"vision_encoder.embeddings.cls_token": torch.zeros(1, 1, 4), "epoch": 3})


def test_published_settings_become_ours() -> None:
    settings = {
        "vision_encoder_args": {
            "token_keep_rate": 0.6,
            "token_keep_strategy": "random",
            "token_drop_loc": [1, 2],
            "sparse_local_attn": 3,
            "sparse_random_attn": None,
            "attn_block_size": 8,
            "num_cls_tokens": 1,
            "token_3d_order": "none",
        },
        "text_encoder_args": {
            "token_keep_rate": 0.1,
            "token_drop_loc": [10],
            "token_keep_strategy": "avg_attn",
        },
        "joint_encoder_args": {"token_keep_rate": 0.5},
    }
    video, top = settings_from_official(settings)
    assert video == {
        "keep_rate": 0.6,
        "prune_score": "random",
        "prune_layers": (1, 2),
        "num_local_blocks": 3,
        "num_random_blocks": None,
        "block_size": 8,
        "token_order": "raster",
    }
    assert top == {
        "multimodal_keep_rate": 0.1,
        "multimodal_prune_layers": (10,),
        "multimodal_score": "avg_attn",
    }
    assert ModelConfig().replaced(video=video, **top).multimodal_prune_layers == (10,)
    with pytest.raises(WeightsError, match=r"num_cls_tokens=2, which this model does not know"):
        settings_from_official({"vision_encoder_args": {"num_cls_tokens": 2}})


def test_embeddings_that_the_published_model_lacks_cannot_be_written_for_it() -> None:
    model = VideoTextModel(tiny_config({"absolute_position_std": 1.0}))
    with pytest.raises(WeightsError, match=r"video_encoder\.time_embedding has no name"):
        to_official(model.state_dict())
