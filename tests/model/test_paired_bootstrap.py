"""The paired bootstrap against all resamples of three questions, and against the exact sign test."""

from itertools import product
from math import comb

import numpy as np
import pytest

from model.paired_bootstrap import paired_bootstrap


def exact_sign_test(num_only_a: int, num_only_b: int) -> float:
    """Two-sided: chance of a split as uneven as this one when both are equally good."""
    total = num_only_a + num_only_b
    tail = sum(comb(total, k) for k in range(min(num_only_a, num_only_b) + 1)) / 2**total
    return min(1.0, 2 * tail)


def test_three_questions_by_all_27_resamples() -> None:
    # Only a right, only a right, only b right: 1, 1, -1.
    found = paired_bootstrap([True, True, False], [False, False, True], seed=0, n=100_000)
    sums = sorted(sum(drawn) for drawn in product((1, 1, -1), repeat=3))
    assert sums == [-3] + [-1] * 6 + [1] * 12 + [3] * 8
    assert found.difference == pytest.approx(100 / 3)
    # One in 27 is -100 %, more than the 2.5 % that the interval leaves out below; 8 in 27 are 100 %.
    assert (found.interval_low, found.interval_high) == (-100, 100)
    assert found.p_value == pytest.approx(2 * 7 / 27, abs=0.01)
    assert (found.num_pairs, found.num_only_a, found.num_only_b) == (3, 2, 1)


def test_the_interval_leaves_out_two_and_a_half_percent_on_either_side() -> None:
    # One of 100 questions differs: it is drawn 0, 1, 2, 3, 4 times in 36.6, 37.0, 18.5, 6.1, 1.5 % of the resamples.
    found = paired_bootstrap([True] * 100, [True] * 99 + [False], seed=0, n=100_000)
    assert (found.difference, found.interval_low, found.interval_high) == (1, 0, 3)
    assert found.p_value == pytest.approx(2 * 0.99**100, abs=0.01)


def test_equal_answers_differ_by_nothing() -> None:
    found = paired_bootstrap([True, False, True], [True, False, True], seed=1)
    assert (found.difference, found.interval_low, found.interval_high, found.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(("num_only_a", "num_only_b"), [(520, 480), (540, 460), (560, 440), (450, 550)])
def test_many_questions_agree_with_the_exact_sign_test(num_only_a: int, num_only_b: int) -> None:
    a = np.array([True] * num_only_a + [False] * num_only_b + [True] * 3000)
    b = np.array([False] * num_only_a + [True] * num_only_b + [True] * 3000)
    found = paired_bootstrap(a, b, seed=3, n=200_000)
    assert found.p_value == pytest.approx(exact_sign_test(num_only_a, num_only_b), rel=0.1, abs=0.01)
    # Normal approximation: the variance of the sum is that of 1000 signs, less the mean's square.
    mean = (num_only_a - num_only_b) / 4000
    half = 1.96 * np.sqrt((1000 / 4000 - mean**2) / 4000)
    assert found.interval_low / 100 == pytest.approx(mean - half, abs=0.0005)
    assert found.interval_high / 100 == pytest.approx(mean + half, abs=0.0005)


def test_swapping_the_two_turns_the_sign_and_keeps_the_verdict() -> None:
    a, b = [True] * 60 + [False] * 40, [False] * 45 + [True] * 55
    forth, back = paired_bootstrap(a, b, seed=4, n=50_000), paired_bootstrap(b, a, seed=5, n=50_000)
    assert forth.difference == -back.difference
    assert forth.p_value == pytest.approx(back.p_value, abs=0.02)


def test_the_smallest_p_value_is_what_so_many_draws_can_say() -> None:
    assert paired_bootstrap([True] * 50, [False] * 50, seed=0, n=999).p_value == 2 / 1000


def test_a_seed_gives_the_same_again() -> None:
    a, b = [True, False] * 50, [True, True, False, False] * 25
    assert paired_bootstrap(a, b, seed=7) == paired_bootstrap(a, b, seed=7)


@pytest.mark.parametrize(("a", "b", "n"), [([True], [], 10), ([], [], 10), ([True], [True], 0)])
def test_answers_that_do_not_pair_up_are_refused(a: list[bool], b: list[bool], n: int) -> None:
    with pytest.raises(ValueError, match="give the same questions"):
        paired_bootstrap(a, b, seed=0, n=n)
