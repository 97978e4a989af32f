"""Scores by hand."""

import pytest
import torch

from model.metrics import (
    egomcq_accuracy,
    egomcq_predictions,
    egomcq_scores,
    retrieval_score,
    target_ranks,
    wilson_interval,
)

NAN = float("nan")


def test_egomcq_by_hand() -> None:
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3, 0.4],  # inter, answer 0: right
            [0.9, 0.1, 0.2, 0.3, 0.4],  # inter, answer 4: wrong
            [0.5, 0.5, 0.2, 0.3, 0.4],  # intra, answer 0: tie, wrong
            [0.1, 0.5, 0.2, 0.3, 0.4],  # intra, answer 1: right
            [0.9, 0.9, 0.2, 0.3, 0.4],  # intra, answer 2: wrong, though others tie
        ]
    )
    answers = torch.tensor([0, 4, 0, 1, 2])
    result = egomcq_accuracy(scores, answers, ["inter", "inter", "intra", "intra", "intra"])
    assert list(result) == ["inter", "intra"]
    assert (result["inter"].num_scored, result["inter"].num_correct, result["inter"].num_ties) == (2, 1, 0)
    assert result["inter"].accuracy == 50
    assert (result["intra"].num_scored, result["intra"].num_correct, result["intra"].num_ties) == (3, 1, 1)
    assert result["intra"].accuracy == pytest.approx(100 / 3)


def test_moving_choices_and_answer_together_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, 5, generator=generator)
    answers = torch.randint(5, (50,), generator=generator)
    kinds = ["inter", "intra"] * 25
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = egomcq_accuracy(scores[:, order], order.argsort()[answers], kinds)
    assert moved == egomcq_accuracy(scores, answers, kinds)


def test_equal_scores_are_all_ties_and_all_wrong() -> None:
    result = egomcq_accuracy(torch.zeros(7, 5), torch.zeros(7, dtype=torch.long), ["intra"] * 7)
    assert list(result) == ["intra"]
    assert (result["intra"].num_ties, result["intra"].accuracy) == (7, 0)


def test_a_score_that_is_no_number_is_wrong() -> None:
    scores = torch.tensor([[float("nan"), 0, 0, 0, 0], [1, float("nan"), 0, 0, 0]])
    assert egomcq_accuracy(scores, torch.tensor([0, 0]), ["inter"] * 2)["inter"].num_correct == 0


@pytest.mark.parametrize(
    ("answers", "kinds", "words"),
    [([0], ["middle"], "middle"), ([5], ["inter"], r"0\.\.4"), ([0, 0], ["inter"], "must be equal")],
)
def test_bad_questions_are_refused(answers: list[int], kinds: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        egomcq_accuracy(torch.zeros(1, 5), torch.tensor(answers), kinds)


def test_scores_are_cosines() -> None:
    text = torch.tensor([[2.0, 0.0]])
    choices = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0], [0.5, 0.0]]])
    torch.testing.assert_close(egomcq_scores(text, choices), torch.tensor([[1.0, 0.0, -1.0, 0.5**0.5, 1.0]]))


def test_wilson_interval_has_the_known_widths() -> None:
    low, high = wilson_interval(9, 10)
    assert (low, high) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    low, high = wilson_interval(22800, 24000)
    assert (high - low) / 2 == pytest.approx(0.0028, abs=1e-4)
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(0, 5)[0] == 0
    assert wilson_interval(5, 5)[1] == 1


def test_a_prediction_is_the_only_best_choice_or_none() -> None:
    scores = torch.tensor(
        [[0.1, 0.5, 0.2], [0.5, 0.1, 0.5], [0.5, 0.1, 0.1], [0.5, NAN, 0.1], [NAN, 0.1, 0.2], [0, 0, 0]]
    )
    assert egomcq_predictions(scores).tolist() == [1, -1, 0, -1, -1, -1]
    with pytest.raises(ValueError, match="at least 2 choices"):
        egomcq_predictions(torch.zeros(3, 1))


def test_retrieval_by_hand() -> None:
    # Ranks of the diagonal: 1 (3 is best), 2 (3 before 2), 3 (0 is last), 6 (all others before it).
    similarity = torch.tensor(
        [
            [3.0, 1.0, 2.0, 0.0, 0.0, 0.0],
            [3.0, 2.0, 1.0, 0.0, 0.0, 0.0],
            [1.0, 2.0, 0.5, 0.0, 0.0, 0.0],
            [1.0, 2.0, 0.5, 0.0, 0.1, 0.2],
        ]
    )
    ranks = target_ranks(similarity, torch.arange(4))
    assert ranks.tolist() == [1, 2, 3, 6]
    score = retrieval_score(ranks)
    assert {k: recall.recall for k, recall in score.recalls.items()} == {1: 25, 5: 75, 10: 100}
    assert [recall.num_found for recall in score.recalls.values()] == [1, 3, 4]
    assert score.recalls[5].interval_low / 100 == wilson_interval(3, 4)[0]
    assert score.recalls[5].interval_high / 100 == wilson_interval(3, 4)[1]
    assert (score.median_rank, score.num_queries) == (2.5, 4)
    with pytest.raises(ValueError, match="no query"):
        retrieval_score(torch.zeros(0, dtype=torch.long))


def test_ties_and_scores_that_are_no_numbers_count_against_the_query() -> None:
    assert target_ranks(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0])).tolist() == [2]
    assert target_ranks(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([2])).tolist() == [3]
    assert target_ranks(torch.tensor([[1.0, NAN, 0.0]]), torch.tensor([0])).tolist() == [2]
    assert target_ranks(torch.tensor([[NAN, 1.0, 0.0]]), torch.tensor([0])).tolist() == [3]


def test_the_best_of_several_targets_counts_and_the_others_are_not_in_its_way() -> None:
    similarity = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    targets = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]).bool()
    assert target_ranks(similarity, targets).tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"queries \[1\] have no target"):
        target_ranks(similarity, torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]).bool())
    with pytest.raises(ValueError, match="nothing to rank"):
        target_ranks(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
