"""The corrected model against vectors of the published code, in the cases where its quirks play no part.

`tests/golden/svitt` holds inputs, weights and outputs of a tiny model (see its README).
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.config import ModelConfig
from model.losses import info_nce, mlm_loss, vtm_loss
from model.sparsity import EdgeLayout
from model.video_text_model import VideoTextModel
from model.weights import from_official, load_for_num_frames

GOLDEN = Path(__file__).parents[1] / "golden" / "svitt"
SPARSITY = {
    # num_local_blocks, num_random_blocks, keep_rate
    "dense": (1, None, 1.0),
    "edge": (1, 2, 1.0),
    "node": (1, None, 0.7),
    "local": (1, 0, 1.0),
    "random_only": (0, 2, 1.0),
    "both_q50": (1, 1, 0.5),
}


def test_the_cases_here_are_those_that_need_no_quirk() -> None:
    cases = json.loads((GOLDEN / "cases.json").read_text())
    free = {
        name.split("/")[1]
        for name, case in cases.items()
        if name.startswith("encoder_T4/") and not case["needs_official_quirks"]
    }
    assert set(SPARSITY) == free


@cache
def _vectors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def _model(num_frames: int, video: dict[str, Any], **top: Any) -> VideoTextModel:
    video = {
        "num_frames": num_frames,
        "image_size": 64,
        "width": 48,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "block_size": 4,
        **video,
    }
    text = {
        "vocab_size": 200,
        "width": 48,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "max_length": 32,
        "cls_id": 1,
        "mask_id": 3,
    }
    config = ModelConfig().replaced(video=video, text=text, joint_width=16, learn_temperature=True, **top)
    model = VideoTextModel(config)
    state = from_official({**_vectors("weights"), **_vectors(f"tables_T{num_frames}")})
    report = load_for_num_frames(model, state)
    assert not report.inflated
    assert not report.new
    return model.eval()


def _encoder_model(mode: str, backend: str) -> VideoTextModel:
    num_local, num_random, keep_rate = SPARSITY[mode]
    return _model(
        4,
        {
            "num_local_blocks": num_local,
            "num_random_blocks": num_random,
            "keep_rate": keep_rate,
            "attention_backend": backend,
        },
    )


def _layouts(mode: str, model: VideoTextModel, vectors: dict[str, Tensor]) -> list[EdgeLayout | None] | None:
    num_local, num_random, _ = SPARSITY[mode]
    if num_random is None:
        return None
    layouts: list[EdgeLayout | None] = []
    for layer, num_patches in enumerate(model.config.video.tokens_by_layer()[:12]):
        own = torch.arange(-(-num_patches // 4))[:, None]
        parts = [own] if num_local else []
        if num_random:
            parts.append(vectors[f"{mode}/blocks_layer{layer:02d}"])
        layouts.append(EdgeLayout.from_blocks(torch.cat(parts, dim=1), 4, num_patches))
    return layouts


@pytest.mark.parametrize("backend", ["reference", "blocks", "fused"])
@pytest.mark.parametrize("mode", list(SPARSITY))
def test_encoder_equals_the_published_code(mode: str, backend: str) -> None:
    vectors = _vectors("encoder_T4")
    video = vectors["video"].float() / 32
    model = _encoder_model(mode, backend)
    layouts = _layouts(mode, model, vectors)
    with torch.inference_mode():
        encoding = model.video_encoder(video, layouts=layouts)
        output = model.encode_video(video, layouts=layouts)
    torch.testing.assert_close(encoding.tokens_BMD, vectors[f"{mode}/last_hidden"], atol=5e-5, rtol=0)
    torch.testing.assert_close(encoding.pooled_BD, vectors[f"{mode}/pooled"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.tokens_BMD[:, :2], vectors[f"{mode}/embeds_last"], atol=5e-5, rtol=0)
    torch.testing.assert_close(output.features_BP, vectors[f"{mode}/feat"], atol=1e-5, rtol=0)
    if model.config.video.keep_rate < 1:
        for layer, kept in zip((3, 6, 9), encoding.keep_indices, strict=True):
            assert torch.equal(kept, vectors[f"{mode}/kept_layer{layer:02d}"])
    if backend == "fused":  # computes in float32
        return
    with torch.inference_mode():
        exact = model.double().video_encoder(video.double(), layouts=layouts)
    torch.testing.assert_close(exact.pooled_BD, vectors[f"{mode}/pooled_f64"], atol=1e-9, rtol=0)


def test_the_curve_is_the_published_one_until_padding_begins() -> None:
    vectors = _vectors("encoder_T4")
    video = {"num_random_blocks": 2, "keep_rate": 0.7, "token_order": "zcurve"}
    model = _model(4, video)
    assert torch.equal(model.video_encoder.order, vectors["both_zcurve/token_order"])
    states: list[Tensor] = []
    for layer in model.video_encoder.layers[:4]:
        layer.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    layouts: list[EdgeLayout | None] = [
        EdgeLayout.from_blocks(
            torch.cat(
                [torch.arange(-(-count // 4))[:, None], vectors[f"both_zcurve/blocks_layer{layer:02d}"]], 1
            ),
            4,
            count,
        )
        for layer, count in enumerate(model.config.video.tokens_by_layer()[:12])
    ]
    with torch.inference_mode():
        encoding = model.video_encoder(vectors["video"].float() / 32, layouts=layouts)
    for layer, state in enumerate(states):
        expected = vectors["both_zcurve/cls_by_layer"][:, layer + 1]
        torch.testing.assert_close(state[:, 0], expected, atol=5e-5, rtol=0)
    assert torch.equal(encoding.keep_indices[0], vectors["both_zcurve/kept_layer03"])


PRETRAINING = {
    # keep_rate, multimodal settings
    "pretrain_dense_T2_xprune10": (1.0, {"multimodal_keep_rate": 0.1, "multimodal_prune_layers": (10,)}),
    "pretrain_node_T2_xprune9_10_avg": (
        0.7,
        {
            "multimodal_keep_rate": 0.5,
            "multimodal_prune_layers": (9, 10),
            "multimodal_score": "avg_attn",
        },
    ),
}


@pytest.mark.parametrize("name", list(PRETRAINING))
def test_text_fusion_and_losses_equal_the_published_code(name: str) -> None:
    keep_rate, multimodal = PRETRAINING[name]
    vectors = _vectors(name)
    model = _model(2, {"num_random_blocks": None, "keep_rate": keep_rate}, **multimodal)
    mask = vectors["attention_mask"].bool()
    with torch.inference_mode():
        video = model.encode_video(vectors["video"].float() / 32)
        text = model.encode_text(vectors["input_ids"], mask)
        masked = model.encode_text(vectors["mlm_input_ids"], mask)
        matching = model.fuse(text.states_BLD, mask, video.tokens_BMD)
        wrong_video, wrong_text = vectors["neg_video_for_text"], vectors["neg_text_for_video"]
        own = torch.arange(len(mask))
        pairs = model.fuse(
            text.states_BLD[torch.cat([own, own, wrong_text])],
            mask[torch.cat([own, own, wrong_text])],
            video.tokens_BMD,
            torch.cat([own, wrong_video, own]),
        )
        vtm_logits = model.matching_logits(pairs.states_QLD)
        hidden = model.fuse(masked.states_BLD, mask, video.tokens_BMD).states_QLD
        mlm_logits = model.text_encoder.mlm_head(hidden)
    real = mask[..., None].expand_as(text.states_BLD)

    def close(ours: Tensor, theirs: Tensor, limit: float) -> None:
        torch.testing.assert_close(ours, theirs, atol=limit, rtol=0)

    close(video.tokens_BMD, vectors["vision_embeds"], 5e-5)
    close(video.features_BP, vectors["vision_feat"], 1e-5)
    close(text.features_BP, vectors["text_feat"], 1e-5)
    close(text.states_BLD[real], vectors["text_embeds"][real], 5e-5)
    close(matching.states_QLD[real], vectors["fusion_last_hidden"][real], 5e-5)
    for layer, kept in zip(multimodal["multimodal_prune_layers"], matching.keep_indices, strict=True):
        assert torch.equal(kept, vectors[f"xkept_layer{layer:02d}"])
    close(vtm_logits, vectors["itm_logits"], 2e-4)
    close(mlm_logits[mask], vectors["mlm_logits"][mask], 2e-4)

    logits = text.features_BP @ video.features_BP.T / vectors["temp_after"]
    close(logits.T, vectors["sim_i2t"], 2e-4)
    same = vectors["idx"][:, None] == vectors["idx"]
    close(info_nce(logits, same), vectors["loss_ita"], 1e-5)
    close(vtm_loss(vtm_logits, torch.ones(len(mask), dtype=torch.bool)), vectors["loss_itm"], 1e-5)
    selected = vectors["mlm_labels"] != -100
    close(mlm_loss(mlm_logits[selected], vectors["mlm_labels"][selected]), vectors["loss_mlm"], 1e-5)
