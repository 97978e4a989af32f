"""How often attention runs when layers are recomputed, and what waits in host memory. Equal gradients are tested
beside the encoders, bytes in tests/jobs/test_activation_memory.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.recompute import ATTENTION_OPS
from model.video_encoder import VideoEncoder
from model.video_text_model import VideoTextModel
from tests.model.tiny import tiny_batch, tiny_config


class _Count(TorchDispatchMode):
    """Counts runs of attention kernels."""

    num_runs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_runs += func.name() in ATTENTION_OPS
        return func(*args, **(kwargs or {}))


def _encoder(**video: object) -> VideoEncoder:
    torch.manual_seed(0)
    return VideoEncoder(tiny_config(video).video)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("mode", "runs_a_layer"), [("all_but_attention", 1), ("all", 2)])
@pytest.mark.parametrize("backend", ["fused", "blocks"])
def test_attention_runs_again_only_when_all_is_recomputed(
    backend: str, mode: str, runs_a_layer: int, offload: bool
) -> None:
    encoder = _encoder(attention_backend=backend, recompute=mode, offload_activations=offload)
    with _Count() as count:
        encoder(tiny_batch(tiny_config()).video).pooled_BD.sum().backward()
    assert count.num_runs == runs_a_layer * encoder.config.depth


def test_attention_by_triton_is_among_the_kept() -> None:
    pytest.importorskip("triton")
    from model.attention_triton import triton_attention

    assert triton_attention._opoverload.name() in ATTENTION_OPS


@pytest.mark.parametrize("mode", ["none", "all"])
def test_the_backward_pass_can_be_repeated(mode: str) -> None:
    gradients = []
    for recompute in (mode, "all_but_attention"):
        encoder = _encoder(attention_backend="blocks", recompute=recompute)
        loss = encoder(tiny_batch(tiny_config()).video).pooled_BD.square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    torch.testing.assert_close(*gradients)


def test_host_memory_is_taken_where_the_caller_says() -> None:
    entered = 0

    @contextmanager
    def on_host() -> Iterator[None]:
        nonlocal entered
        entered += 1
        yield

    settings = {"recompute": "all", "offload_activations": True}
    config = tiny_config(settings, text=settings)
    model, batch = VideoTextModel(config), tiny_batch(config)
    model.offload_within(on_host)
    with torch.no_grad():
        model.encode_video(batch.video)
    assert entered == 0
    video = model.encode_video(batch.video)
    assert entered == config.video.depth
    states = model.encode_text(batch.text_ids, batch.text_mask).states_BLD
    fused = model.fuse(states, batch.text_mask, video.tokens_BMD).states_QLD
    assert entered == config.video.depth + config.text.depth
    fused.sum().backward()
    assert entered == config.video.depth + config.text.depth
