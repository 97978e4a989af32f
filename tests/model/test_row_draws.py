"""Numbers drawn by row: even, independent, and the row's own whatever stands beside it."""

import pytest
import torch

from model.row_draws import RowDraws, mix


def _draws(num_rows: int = 500, seed: int = 3) -> RowDraws:
    return RowDraws.of(seed, torch.arange(num_rows))


def test_seeds_are_fixed_numbers() -> None:
    # Written down once: another value would change every run that is resumed.
    assert RowDraws.of(7, torch.tensor([0, 1, 2])).keys_B.tolist() == [313405475, -780728426, -1228971716]
    assert mix(torch.tensor([0, 1], dtype=torch.int32)).tolist() == [0, 1753845952]


def test_uniform_numbers_are_even_and_uncorrelated() -> None:
    u = _draws().uniform(400)
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 16, 0, 1)
    assert float(((counts - 12500) ** 2 / 12500).sum()) < 45  # chi-square of 15 degrees: 1 in 10,000
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:]), (u, _draws().at(1).uniform(400))):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.01


def test_a_row_draws_the_same_in_any_company() -> None:
    clips = torch.tensor([5, 2**40, 5, 0])
    whole = RowDraws.of(1, clips).at(4).bits(3, 2)
    for row in range(4):
        assert torch.equal(RowDraws.of(1, clips[row : row + 1]).at(4).bits(3, 2)[0], whole[row])
    assert torch.equal(RowDraws.of(1, clips).rows(torch.tensor([3, 1])).at(4).bits(3, 2), whole[[3, 1]])
    assert torch.equal(whole[0], whole[2])


def test_pairs_depend_on_both_and_on_their_order() -> None:
    a, b = _draws(), _draws(seed=4)
    assert not (a.paired(b).keys_B == b.paired(a).keys_B).any()
    crossed = a.rows(torch.zeros(500, dtype=torch.long)).paired(b).keys_B
    assert len(crossed.unique()) == 500


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate_keeps_the_mean_and_its_gradient_is_the_same_mask(rate: float) -> None:
    x = torch.ones(500, 300, requires_grad=True)
    dropped = _draws().dropout(x, rate)
    dropped.sum().backward()
    assert float((dropped == 0).float().mean()) == pytest.approx(rate, abs=0.005)
    assert float(dropped.detach().mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(x.grad, dropped.detach())
    assert torch.equal(dropped.detach() != 0, _draws().keep(rate, 300))


def test_no_dropout_hands_back_what_it_got() -> None:
    x = torch.ones(2, 3)
    assert _draws(2).dropout(x, 0) is x
