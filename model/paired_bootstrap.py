"""Is one model better than another on the same questions, or was it luck? Pure: answers in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Accuracy of a minus accuracy of b in percentage points, its 95 % interval, and a two-sided p-value.

    `num_only_a` and `num_only_b` are the questions that one of them alone has right: all that the test looks at.
    """

    difference: float
    interval_low: float
    interval_high: float
    p_value: float
    num_pairs: int
    num_only_a: int
    num_only_b: int


def paired_bootstrap(
    correct_a: Sequence[bool] | Bool[np.ndarray, " Q"],
    correct_b: Sequence[bool] | Bool[np.ndarray, " Q"],
    seed: int,
    n: int = 10_000,
) -> PairedDifference:
    """Draws the questions `n` times anew, with repeats, and looks how the difference varies.

    The interval holds the middle 95 % of the drawn differences. The p-value is twice the share of them on the far side
    of 0 (0 itself counted), and at least 2 / (n + 1): so many draws cannot say less. Raises ValueError for answers
    that do not pair up, none at all, or `n` below 1.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0 or n < 1:
        raise ValueError(
            f"answers have shapes {a.shape} and {b.shape}, n is {n}; give the same questions of both, at least one "
            "question and one draw"
        )
    num_pairs, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    # A draw of questions counts how often each of three kinds comes, so the counts are drawn instead of the questions.
    shares = np.array([only_a, only_b, num_pairs - only_a - only_b]) / num_pairs
    drawn = np.random.default_rng(seed).multinomial(num_pairs, shares, size=n)
    differences = drawn[:, 0] - drawn[:, 1]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(differences, (tail, 1 - tail)) * (100 / num_pairs)
    beyond = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    p_value = min(1.0, 2 * (beyond + 1) / (n + 1))
    difference = 100 * (only_a - only_b) / num_pairs
    return PairedDifference(difference, float(low), float(high), p_value, num_pairs, only_a, only_b)
