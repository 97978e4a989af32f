"""Bytes that the video encoder keeps for its backward pass in every mode of `recompute`, counted by the budget."""

import shutil
from multiprocessing import get_context

import pytest
import torch

from infra.memory_budget import device_budget
from model.config import VideoConfig
from model.video_encoder import VideoEncoder

BATCH, TOKENS, WIDTH, HEADS, DEPTH = 2, 1 + 2 * 4 * 4, 32, 2, 3
STATES = BATCH * TOKENS * WIDTH * 4
SOFTMAX = BATCH * TOKENS * HEADS * 4


def _kept(recompute: str, offload: bool) -> tuple[int, int, int]:
    """Bytes on the device and on the host between forward and backward pass, and the device's peak."""
    torch.manual_seed(0)
    config = VideoConfig.model_validate(
        {
            "num_frames": 2, "image_size": 16, "patch_size": 4, "width": WIDTH, "depth": DEPTH, "num_heads": HEADS,
            "keep_rate": 1.0, "block_size": 8, "num_random_blocks": 1, "attention_backend": "fused",
            "recompute": recompute, "offload_activations": offload,
        }
    )  # fmt: skip
    encoder, video = VideoEncoder(config), torch.randn(BATCH, 2, 3, 16, 16)
    budget = device_budget(torch.device("cpu"), None)
    encoder.run_layer.on_host = budget.on_host
    encoder(video).pooled_BD.sum().backward()  # gradients stand ready, the kernel is loaded
    budget.reset_peak()
    before, host_before = budget.live_bytes(), budget.host_bytes() or 0
    pooled = encoder(video).pooled_BD
    kept = budget.live_bytes() - before, (budget.host_bytes() or 0) - host_before
    pooled.sum().backward()
    del pooled
    assert (budget.live_bytes(), budget.host_bytes()) == (before, host_before)
    return *kept, budget.peak_bytes() - before


def modes_by_hand() -> None:
    device_budget(torch.device("cpu"), None)
    none = _kept("none", False)
    but_attention, but_attention_offloaded = (_kept("all_but_attention", on) for on in (False, True))
    recomputed, offloaded = (_kept("all", on) for on in (False, True))
    assert none[1] == but_attention[1] == recomputed[1] == 0
    # Inputs of the layers, results and softmax sums of their attention.
    assert offloaded[1] == recomputed[0] - offloaded[0] == DEPTH * STATES
    assert but_attention[0] - recomputed[0] == DEPTH * (STATES + SOFTMAX)
    assert but_attention_offloaded[:2] == (offloaded[0], DEPTH * (2 * STATES + SOFTMAX))
    assert none[2] > but_attention[2] > recomputed[2] > offloaded[2]


def test_every_mode_keeps_what_it_says() -> None:
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    # In a process of its own: its allocator stays replaced.
    process = get_context("spawn").Process(target=modes_by_hand)
    process.start()
    process.join()
    assert process.exitcode == 0
