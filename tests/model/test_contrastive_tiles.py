"""The tiled contrastive loss against the readable one under autograd. Two ranks: test_collectives."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.contrastive_tiles import ContrastiveResult, contrastive_tiles
from model.losses import ActionTags, ego_nce, info_nce
from tests.model.contrastive_cases import CASES, features_and_tags


def _reference(
    text: Tensor, video: Tensor, temperature: Tensor, tags: ActionTags, case: dict[str, Any]
) -> ContrastiveResult:
    text, video, temperature = (part.clone().requires_grad_() for part in (text, video, temperature))
    logits = text @ video.T / temperature
    positives = tags.positives(tags, case["positives"])
    criterion = ego_nce if case["loss"] == "ego_nce" else info_nce
    loss = criterion(logits, positives, case["directions"])
    gradients = torch.autograd.grad(loss, (text, video, temperature))
    right = positives.gather(1, logits.argmax(dim=1, keepdim=True)).float().mean()
    return ContrastiveResult(loss.detach(), right, *gradients)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_loss_accuracy_and_gradients_equal_those_of_the_whole_matrix(case: dict[str, Any], tile: int) -> None:
    inputs = features_and_tags(20)
    ours, expected = contrastive_tiles(*inputs, **case, tile=tile), _reference(*inputs, case)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(ours, name), value, atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_saturated_batch_stays_finite_and_equal(case: dict[str, Any]) -> None:
    inputs = features_and_tags(20, temperature=0.001)
    ours, expected = contrastive_tiles(*inputs, **case, tile=6), _reference(*inputs, case)
    for name, value in expected._asdict().items():
        assert getattr(ours, name).isfinite().all()
        torch.testing.assert_close(getattr(ours, name), value, atol=1e-3, rtol=1e-4, msg=name)


def test_a_batch_of_positives_alone_has_no_loss() -> None:
    text, video, temperature, tags = features_and_tags(6)
    tags = tags._replace(clip_index_B=torch.zeros(6, dtype=torch.long))
    ours = contrastive_tiles(text, video, temperature, tags, **CASES[0], tile=4)
    assert float(ours.loss) == pytest.approx(0, abs=1e-6)
    assert float(ours.accuracy) == 1
    assert float(ours.text_gradient_BP.abs().max()) < 1e-6


class _Sizes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, Tensor):
                self.largest = max(self.largest, part.numel())
        return out


def test_no_tensor_is_larger_than_a_tile_or_the_features() -> None:
    inputs = features_and_tags(300)
    with _Sizes() as sizes:
        contrastive_tiles(*inputs, **CASES[0], tile=32)
    assert sizes.largest == 300 * 8
