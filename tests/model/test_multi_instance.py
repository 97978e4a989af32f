"""Multi-instance retrieval by hand, against a slow second reading of the definitions, and against scikit-learn's."""

from math import log2

import numpy as np
import pytest

from model.multi_instance import average_precision, multi_instance_score, ndcg, relevancy

SIMILARITY = np.array([[0.9, 0.8, 0.7, 0.6]])
RELEVANCE = np.array([[0.5, 1.0, 0.0, 1.0]])


def hot(*rows: tuple[int, ...]) -> np.ndarray:
    out = np.zeros((len(rows), 4), dtype=bool)
    for row, classes in enumerate(rows):
        out[row, list(classes)] = True
    return out


def test_relevancy_is_the_mean_of_the_overlaps_of_verbs_and_nouns() -> None:
    found = relevancy(hot((0,), (1,)), hot((0, 1), (2,)), hot((0,), (2,), (1, 0)), hot((1, 2), (2,), (3,)))
    # Query 0 and the candidates: same verb and one noun of three; nothing; one verb of two. Query 1: one noun of two;
    # the same noun; one verb of two.
    expected = [[(1 + 1 / 3) / 2, 0, (1 / 2 + 0) / 2], [(0 + 1 / 2) / 2, 1 / 2, (1 / 2 + 0) / 2]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)
    assert relevancy(hot((1, 2)), hot((3, 0)), hot((1, 2)), hot((3, 0))).tolist() == [[1]]
    with pytest.raises(ValueError, match=r"rows \[1\] have no noun class"):
        relevancy(hot((0,)), hot((1,)), hot((0,), (0,)), hot((1,), ()))


def test_average_precision_counts_right_candidates_only() -> None:
    # Right ones stand at ranks 2 and 4.
    assert average_precision(SIMILARITY, RELEVANCE).tolist() == [(1 / 2 + 2 / 4) / 2]


def test_official_average_precision_adds_up_partial_relevance() -> None:
    found = average_precision(SIMILARITY, RELEVANCE, partial_relevance_counts=True)
    assert found.tolist() == [(1.5 / 2 + 2.5 / 4) / 2]


def test_ndcg_looks_at_as_many_ranks_as_there_are_relevant_candidates() -> None:
    # Three relevant, so three ranks: 0.5, 1, 0 found, 1, 1, 0.5 possible.
    gained, possible = 0.5 + 1 / log2(3), 1 + 1 / log2(3) + 0.5 / 2
    assert ndcg(SIMILARITY, RELEVANCE)[0] == pytest.approx(gained / possible, abs=1e-15)
    assert ndcg(RELEVANCE, RELEVANCE).tolist() == [1]


def test_of_equally_similar_candidates_the_less_relevant_comes_first() -> None:
    equal = np.zeros((1, 4))
    # Ranked 0, 0.5, 1, 1.
    assert average_precision(equal, RELEVANCE).tolist() == [(1 / 3 + 2 / 4) / 2]
    possible = 1 + 1 / log2(3) + 0.5 / 2
    assert ndcg(equal, RELEVANCE)[0] == pytest.approx((0.5 / log2(3) + 1 / 2) / possible, abs=1e-15)


def test_the_score_is_the_mean_over_queries_in_percent_and_directions_differ() -> None:
    similarity = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    relevance = np.array([[1.0, 0.0], [0.5, 1.0], [1.0, 0.0]])
    forth, back = multi_instance_score(similarity, relevance), multi_instance_score(similarity.T, relevance.T)
    assert (forth.num_queries, back.num_queries) == (3, 2)
    assert forth.mean_average_precision == pytest.approx(100 * (1 + 1 / 2 + 1) / 3)
    assert forth.official_map == pytest.approx(100 * (1 + 1.5 / 2 + 1) / 3)
    # Column 0 ranks 1, 0.5, 1; column 1 ranks 0, 1, 0.
    assert back.mean_average_precision == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1 / 2) / 2)
    assert back.official_map == pytest.approx(100 * ((1 + 2.5 / 3) / 2 + 1 / 2) / 2)
    column_0 = (1 + 0.5 / log2(3) + 1 / 2) / (1 + 1 / log2(3) + 0.5 / 2)
    assert back.ndcg == pytest.approx(100 * (column_0 + 0) / 2)


def slow_scores(similarity: list[float], relevance: list[float]) -> tuple[float, float, float]:
    """AP, official AP and nDCG of one query, rank by rank."""
    order = sorted(range(len(similarity)), key=lambda c: (-similarity[c], relevance[c]))
    num_right = seen_right = 0
    seen, plain, official = 0.0, 0.0, 0.0
    for rank, candidate in enumerate(order, start=1):
        seen += relevance[candidate]
        if relevance[candidate] == 1:
            num_right += 1
            seen_right += 1
            plain += seen_right / rank
            official += seen / rank
    num_relevant = sum(value > 0 for value in relevance)
    best = sorted(relevance, reverse=True)
    gained = sum(relevance[order[i]] / log2(i + 2) for i in range(num_relevant))
    possible = sum(best[i] / log2(i + 2) for i in range(num_relevant))
    return plain / num_right, official / num_right, gained / possible


def random_matrices(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    relevance = generator.choice([0, 0, 0, 1 / 6, 0.25, 0.5, 0.75, 1], size=(40, 30))
    relevance[:, 3] = 1
    return generator.normal(size=(40, 30)).round(1), relevance


@pytest.mark.parametrize("seed", range(3))
def test_a_slow_reading_of_the_definitions_gives_the_same(seed: int) -> None:
    similarity, relevance = random_matrices(seed)
    expected = [slow_scores(*pair) for pair in zip(similarity.tolist(), relevance.tolist(), strict=True)]
    found = (
        average_precision(similarity, relevance),
        average_precision(similarity, relevance, partial_relevance_counts=True),
        ndcg(similarity, relevance),
    )
    np.testing.assert_allclose(np.transpose(found), expected, rtol=1e-12)


def test_scikit_learn_gives_the_same_without_ties() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    _, relevance = random_matrices(5)
    similarity = np.random.default_rng(6).normal(size=relevance.shape)
    for query, (scores, right) in enumerate(zip(similarity, relevance, strict=True)):
        assert average_precision(similarity, relevance)[query] == pytest.approx(
            metrics.average_precision_score(right == 1, scores), rel=1e-12
        )
        cut = int((right > 0).sum())
        assert ndcg(similarity, relevance)[query] == pytest.approx(
            metrics.ndcg_score(right[None], scores[None], k=cut), rel=1e-12
        )


@pytest.mark.parametrize(
    ("similarity", "relevance", "words"),
    [
        ([[1.0, 2.0]], [[1.0]], "both must be"),
        ([[1.0, float("nan")]], [[1.0, 0.0]], "a similarity that is not finite, first \\[0\\]"),
        ([[1.0, 2.0]], [[1.0, 1.5]], "a relevance outside"),
        (
            [[1.0, 2.0], [1.0, 2.0]],
            [[1.0, 0.5], [0.0, 0.5]],
            "1 queries have nothing of relevance 1, first \\[1\\]",
        ),
    ],
)
def test_matrices_that_cannot_be_scored_are_refused(similarity: list, relevance: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        multi_instance_score(np.array(similarity), np.array(relevance))
