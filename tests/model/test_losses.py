"""Losses against values computed by hand."""

from math import exp, log

import pytest
import torch
from torch import Tensor

from model.losses import (
    ActionTags,
    ego_nce,
    info_nce,
    mask_tokens,
    matching_losses,
    sample_negatives,
    word_losses,
)
from model.row_draws import RowDraws


def _tags(*rows: list[int], size: int = 4) -> Tensor:
    tags = torch.zeros(len(rows), size, dtype=torch.bool)
    for number, row in enumerate(rows):
        tags[number, row] = True
    return tags


def positives_mask(verbs: Tensor, nouns: Tensor, clips: Tensor | None = None) -> Tensor:
    tags = ActionTags(verbs, nouns, torch.arange(len(verbs)) if clips is None else clips)
    return tags.positives(tags, "action")


def negatives(logits: Tensor, positives: Tensor, seed: int, hard: bool = True) -> Tensor:
    rows, columns = torch.arange(len(logits)), torch.arange(logits.shape[1])
    draws = RowDraws.of(seed, rows), RowDraws.of(seed + 10**6, columns)
    return sample_negatives(logits, positives, *draws, hard)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_positives_share_a_verb_and_a_noun() -> None:
    verbs = _tags([0], [0, 1], [1], [])
    nouns = _tags([2], [2, 3], [2], [2])
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert positives_mask(verbs, nouns).int().tolist() == expected


def test_rows_without_tags_are_positives_only_of_themselves() -> None:
    empty = _tags([], [], [])
    assert torch.equal(positives_mask(empty, empty), torch.eye(3, dtype=torch.bool))


def test_a_clip_drawn_twice_is_never_its_own_negative() -> None:
    empty = _tags([], [], [])
    mask = positives_mask(empty, empty, torch.tensor([5, 6, 5]))
    assert mask.int().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_ego_nce_by_hand() -> None:
    logits = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    rows = (log(exp(1) + exp(0)) - 1 + log(exp(2) + exp(3)) - 3) / 2
    columns = (log(exp(1) + exp(2)) - 1 + log(exp(0) + exp(3)) - 3) / 2
    own = torch.eye(2, dtype=torch.bool)
    assert float(ego_nce(logits, own)) == pytest.approx(rows + columns, rel=1e-6)
    assert float(ego_nce(logits, own, "mean")) == pytest.approx((rows + columns) / 2, rel=1e-6)


def test_ego_nce_sums_the_positives_inside_the_logarithm() -> None:
    logits = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    positives = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    rows = [
        -log((exp(1) + exp(0.5)) / (exp(1) + exp(0.5) + 1)),
        -log((1 + exp(1)) / (exp(1) + 2)),
        -log(exp(1) / (exp(1) + 2)),
    ]
    columns = [
        -log((exp(1) + 1) / (exp(1) + 2)),
        -log((exp(0.5) + exp(1)) / (exp(0.5) + exp(1) + 1)),
        -log(exp(1) / (exp(1) + 2)),
    ]
    assert float(ego_nce(logits, positives)) == pytest.approx((sum(rows) + sum(columns)) / 3, rel=1e-6)


def test_ego_nce_is_zero_when_all_are_positives_and_symmetric_in_text_and_video() -> None:
    logits = torch.randn(4, 4, generator=_generator())
    assert float(ego_nce(logits, torch.ones(4, 4, dtype=torch.bool))) == pytest.approx(0, abs=1e-6)
    own = torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(ego_nce(logits, own), ego_nce(logits.T, own))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ego_nce_stays_finite_when_a_negative_holds_all_the_mass(dtype: torch.dtype) -> None:
    logits = torch.tensor([[-500.0, 500.0], [500.0, -500.0]], dtype=dtype, requires_grad=True)
    loss = ego_nce(logits, torch.eye(2, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2000, rel=1e-3)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert loss.dtype == torch.float32


def test_info_nce_spreads_the_target_over_the_positives() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    both = torch.ones(2, 2, dtype=torch.bool)
    row_0, row_1 = log(exp(1) + 1) - 0.5, log(1 + exp(2)) - 1.0
    assert float(info_nce(logits, both)) == pytest.approx((row_0 + row_1) / 2, rel=1e-6)


def test_info_nce_by_hand_in_both_conventions() -> None:
    logits = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    rows = (log(exp(1) + exp(0)) - 1 + log(exp(2) + exp(3)) - 3) / 2
    columns = (log(exp(1) + exp(2)) - 1 + log(exp(0) + exp(3)) - 3) / 2
    own = torch.eye(2, dtype=torch.bool)
    assert float(info_nce(logits, own)) == pytest.approx((rows + columns) / 2, rel=1e-6)
    assert float(info_nce(logits, own, "sum")) == pytest.approx(rows + columns, rel=1e-6)


def test_scene_companions_are_negatives_unless_they_share_the_action() -> None:
    # Rows 0, 1 are anchors, 2, 3 their neighbours in the same scene; 2 repeats the action of 0.
    verbs, nouns = _tags([0], [1], [0], [2]), _tags([0], [1], [0], [1])
    logits = torch.tensor(
        [[2.0, 0.0, 1.0, 0.5], [0.0, 2.0, 0.0, 1.0], [1.0, 0.0, 2.0, 0.0], [0.5, 1.0, 0.0, 2.0]]
    )
    positives = positives_mask(verbs, nouns)
    assert positives.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    first = log(exp(2) + 1 + exp(1) + exp(0.5)) - log(exp(2) + exp(1))
    second = log(exp(2) + exp(1) + 2) - 2
    third = log(exp(2) + exp(1) + 2) - log(exp(2) + exp(1))
    fourth = log(exp(2) + exp(1) + exp(0.5) + 1) - 2
    # The logits are symmetric, so both directions are the same.
    assert float(ego_nce(logits, positives)) == pytest.approx((first + second + third + fourth) / 2, rel=1e-6)
    for seed in range(30):
        assert not positives[torch.arange(4), negatives(logits, positives, seed)].any()


def test_negatives_are_never_positives_and_follow_the_softmax() -> None:
    logits = torch.tensor([[9.0, 2.0, 1.0], [2.0, 9.0, 0.0], [1.0, 0.0, 9.0]])
    positives = torch.eye(3, dtype=torch.bool)
    draws = torch.stack([negatives(logits, positives, seed) for seed in range(600)])
    assert (draws[:, 0] != 0).all()
    assert (draws[:, 1] != 1).all()
    share = float((draws[:, 0] == 1).float().mean())
    assert share == pytest.approx(exp(2) / (exp(2) + exp(1)), abs=0.06)
    even = torch.stack([negatives(logits, positives, seed, hard=False) for seed in range(600)])
    assert float((even[:, 0] == 1).float().mean()) == pytest.approx(0.5, abs=0.06)


def test_negatives_of_a_part_of_the_rows_are_those_of_the_whole() -> None:
    logits = torch.randn(6, 6, generator=_generator())
    positives, rows = torch.eye(6, dtype=torch.bool), RowDraws.of(1, torch.arange(6))
    columns = RowDraws.of(2, torch.arange(6))
    whole = sample_negatives(logits, positives, rows, columns)
    part = torch.tensor([4, 1])
    assert torch.equal(sample_negatives(logits[part], positives[part], rows.rows(part), columns), whole[part])


def test_negatives_avoid_action_positives() -> None:
    positives = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1]]).bool()
    for seed in range(50):
        assert negatives(torch.zeros(3, 3), positives, seed)[1:].tolist() == [2, 1]


def test_a_saturated_positive_still_leaves_a_negative() -> None:
    logits = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]])
    assert negatives(logits, torch.eye(2, dtype=torch.bool), 0).tolist() == [1, 0]


def test_matching_by_hand() -> None:
    losses = matching_losses(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([True, False]))
    assert losses.tolist() == pytest.approx([log(1 + exp(-1)), log(1 + exp(1))], rel=1e-6)


def _captions(rows: int = 200, length: int = 20) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 100, (rows, length), generator=_generator(1))
    ids[:, 0] = 2
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[:, 15:] = False
    ids[:, 15:] = 0
    return ids, mask


def _draws(seed: int = 0) -> RowDraws:
    return RowDraws.of(seed, torch.arange(200))


def test_masking_spares_pad_and_cls_and_keeps_the_shares() -> None:
    ids, mask = _captions()
    masked = mask_tokens(ids, mask, _draws(), probability=0.5, vocab_size=100, mask_id=4, never=(0, 2))
    selected = masked.selected_BL
    assert not selected[:, 0].any()
    assert not selected[:, 15:].any()
    assert torch.equal(masked.ids_BL[~selected], ids[~selected])
    count = int(selected.sum())
    assert count / (200 * 14) == pytest.approx(0.5, abs=0.03)
    hidden = masked.ids_BL[selected]
    # 10 % stay, and a random id is the old one or the mask in 1 of 100 draws.
    assert float((hidden == 4).float().mean()) == pytest.approx(0.801, abs=0.04)
    assert float((hidden == ids[selected]).float().mean()) == pytest.approx(0.101, abs=0.03)


def test_masking_repeats_with_its_keys() -> None:
    ids, mask = _captions()

    def masked_ids(seed: int) -> Tensor:
        return mask_tokens(
            ids, mask, _draws(seed), probability=0.5, vocab_size=100, mask_id=4, never=(0, 2)
        ).ids_BL

    assert torch.equal(masked_ids(3), masked_ids(3))
    assert not torch.equal(masked_ids(3), masked_ids(4))


def test_word_losses_by_hand_and_none_of_none() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    losses = word_losses(logits, torch.tensor([0, 1]))
    assert losses.tolist() == pytest.approx([log(1 + exp(-1)), log(2)], rel=1e-6)
    assert word_losses(logits[:0], torch.empty(0, dtype=torch.long)).shape == (0,)
