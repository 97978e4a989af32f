"""Scores by hand."""

import pytest
import torch

from model.metrics import egomcq_accuracy, egomcq_scores, retrieval, wilson_interval


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


def test_retrieval_by_hand() -> None:
    similarity = torch.tensor([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [1.0, 2.0, 0.0]])
    score = retrieval(similarity)
    assert score.recall_1 == pytest.approx(100 / 3)
    assert score.recall_5 == 100
    assert score.median_rank == 2
    assert score.num_queries == 3


def test_retrieval_counts_ties_against_the_query_and_takes_targets() -> None:
    similarity = torch.tensor([[1.0, 1.0, 0.0]])
    assert retrieval(similarity, torch.tensor([0])).recall_1 == 0
    assert retrieval(similarity, torch.tensor([2])).median_rank == 3
    with pytest.raises(ValueError, match="name the targets"):
        retrieval(similarity)


def test_the_best_of_several_targets_counts_and_the_others_are_not_in_its_way() -> None:
    similarity = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    targets = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]).bool()
    score = retrieval(similarity, targets)
    assert score.recall_1 == 50
    assert score.median_rank == 2
    with pytest.raises(ValueError, match=r"queries \[1\] have no target"):
        retrieval(similarity, torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]).bool())
