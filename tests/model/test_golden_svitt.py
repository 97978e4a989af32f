"""The corrected model against vectors of the published code, in the cases where its quirks play no part.

`tests/golden/svitt` holds inputs, weights and outputs of a tiny model (see its README); nothing here is fitted.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.config import ModelConfig
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


def _model(mode: str, backend: str) -> VideoTextModel:
    num_local, num_random, keep_rate = SPARSITY[mode]
    video = {
        "num_frames": 4,
        "image_size": 64,
        "width": 48,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "num_local_blocks": num_local,
        "num_random_blocks": num_random,
        "keep_rate": keep_rate,
        "block_size": 4,
        "attention_backend": backend,
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
    model = VideoTextModel(
        ModelConfig().replaced(video=video, text=text, joint_width=16, learn_temperature=True)
    )
    report = load_for_num_frames(model, from_official({**_vectors("weights"), **_vectors("tables_T4")}))
    assert not report.inflated
    assert not report.new
    return model.eval()


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


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("mode", list(SPARSITY))
def test_encoder_equals_the_published_code(mode: str, backend: str) -> None:
    vectors = _vectors("encoder_T4")
    video = vectors["video"].float() / 32
    model = _model(mode, backend)
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
    with torch.inference_mode():
        exact = model.double().video_encoder(video.double(), layouts=layouts)
    torch.testing.assert_close(exact.pooled_BD, vectors[f"{mode}/pooled_f64"], atol=1e-9, rtol=0)
