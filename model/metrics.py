"""Scores from similarities: EgoMCQ with its interval, and retrieval. Pure: tensors in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EGOMCQ_KINDS = ("inter", "intra")
RECALLS_AT = (1, 5, 10)


@dataclass(frozen=True, slots=True)
class McqScore:
    """Result of one kind of question; shares in percent. Unreadable questions are not among the scored
    ones.
    """

    num_scored: int
    num_correct: int
    num_ties: int
    accuracy: float
    interval_low: float
    interval_high: float


def egomcq_scores(
    text_features_QP: Float[Tensor, "Q P"], choice_features_QKP: Float[Tensor, "Q K P"]
) -> Float[Tensor, "Q K"]:
    """Cosine of each question's text with its choices, float32; inputs need not be normalised."""
    text = torch.nn.functional.normalize(text_features_QP.float(), dim=-1)
    choices = torch.nn.functional.normalize(choice_features_QKP.float(), dim=-1)
    return torch.einsum("qp,qkp->qk", text, choices)


def egomcq_predictions(scores_QK: Float[Tensor, "Q K"]) -> Int[Tensor, " Q"]:
    """The choice whose score is greater than every other; -1 where there is none: a tie, or scores that are no numbers.

    Raises ValueError when there is nothing to choose from.
    """
    if scores_QK.shape[1] < 2:
        raise ValueError(f"scores have shape {tuple(scores_QK.shape)}: a question has at least 2 choices")
    best_Q2 = scores_QK.topk(2, dim=1)
    is_strict_Q = (best_Q2.values[:, 0] > best_Q2.values[:, 1]) & ~scores_QK.isnan().any(dim=1)
    return best_Q2.indices[:, 0].where(is_strict_Q, -1)


def egomcq_accuracy(
    scores_QK: Float[Tensor, "Q K"], answers_Q: Int[Tensor, " Q"], kinds: Sequence[str]
) -> dict[str, McqScore]:
    """Accuracy for each kind of question (`inter`, `intra`), in that order; no overall mean.

    A question is right when the answer's score is greater than every other; a tie with the best other is
    wrong and counted. A score that is not a number makes its question wrong. Kinds without questions are left
    out. Raises ValueError for lengths that differ, an unknown kind, or an answer outside the choices.
    """
    num_questions, num_choices = scores_QK.shape
    if len(answers_Q) != num_questions or len(kinds) != num_questions:
        raise ValueError(
            f"{num_questions} score rows, {len(answers_Q)} answers, {len(kinds)} kinds: must be equal"
        )
    unknown = sorted(set(kinds) - set(EGOMCQ_KINDS))
    if unknown:
        raise ValueError(f"unknown kinds of question {unknown}; known are {list(EGOMCQ_KINDS)}")
    if num_questions and not 0 <= int(answers_Q.min()) <= int(answers_Q.max()) < num_choices:
        raise ValueError(
            f"answers must lie in 0..{num_choices - 1}, found {answers_Q.min()}..{answers_Q.max()}"
        )
    answer_Q1 = answers_Q[:, None]
    of_answer_Q = scores_QK.gather(1, answer_Q1).squeeze(1)
    best_other_Q = scores_QK.scatter(1, answer_Q1, float("-inf")).max(dim=1).values
    correct_Q, tied_Q = egomcq_predictions(scores_QK) == answers_Q, of_answer_Q == best_other_Q
    results = {}
    for kind in EGOMCQ_KINDS:
        chosen = torch.tensor([own == kind for own in kinds], dtype=torch.bool, device=scores_QK.device)
        scored = int(chosen.sum())
        if scored:
            correct = int((correct_Q & chosen).sum())
            low, high = wilson_interval(correct, scored)
            results[kind] = McqScore(
                scored, correct, int((tied_Q & chosen).sum()), 100 * correct / scored, 100 * low, 100 * high
            )
    return results


def wilson_interval(num_correct: int, num_trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share, 95 % by default; (0, 1) when nothing was tried."""
    if num_trials == 0:
        return 0.0, 1.0
    share = num_correct / num_trials
    denominator = 1 + z**2 / num_trials
    centre = (share + z**2 / (2 * num_trials)) / denominator
    half = z / denominator * sqrt(share * (1 - share) / num_trials + z**2 / (4 * num_trials**2))
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    return (centre - half if num_correct else 0.0), (centre + half if num_correct < num_trials else 1.0)


@dataclass(frozen=True, slots=True)
class RecallScore:
    """Share of the queries whose target is among the best `k`, in percent, with its 95 % interval (Wilson)."""

    num_found: int
    recall: float
    interval_low: float
    interval_high: float


@dataclass(frozen=True, slots=True)
class RetrievalScore:
    """One direction of retrieval; recalls in percent, ranks from 1, the median of an even number in the middle."""

    recalls: dict[int, RecallScore]
    median_rank: float
    num_queries: int


def target_ranks(
    similarity_QC: Float[Tensor, "Q C"], targets: Int[Tensor, " Q"] | Bool[Tensor, "Q C"]
) -> Int[Tensor, " Q"]:
    """Rank of each query's target among the candidates, from 1. Ties count against the query.

    `targets` are the index of each query's target, or True at all its targets, of which the best counts (a caption
    that fits several clips). Other targets of the query are not in its way, a score that is not a number is. Swap the
    axes for the other direction. Raises ValueError when there is nothing to rank, or a query has no target.
    """
    if 0 in similarity_QC.shape:
        raise ValueError(f"nothing to rank: similarity has shape {tuple(similarity_QC.shape)}")
    if targets.dtype != torch.bool:
        targets = torch.zeros_like(similarity_QC, dtype=torch.bool).scatter_(1, targets[:, None], True)
    if not bool(targets.any(dim=1).all()):
        raise ValueError(f"queries {(~targets.any(dim=1)).nonzero().flatten().tolist()} have no target")
    best_Q1 = similarity_QC.masked_fill(~targets, float("-inf")).max(dim=1, keepdim=True).values
    # "Not less" and not ">=": a score that is not a number ranks ahead of the target, never behind it.
    ahead_QC = ~(similarity_QC < best_Q1) & ~targets
    return 1 + ahead_QC.sum(dim=1)


def retrieval_score(rank_Q: Int[Tensor, " Q"]) -> RetrievalScore:
    """Recall at 1, 5 and 10 and the median of ranks. Raises ValueError when there are none."""
    num_queries = len(rank_Q)
    if num_queries == 0:
        raise ValueError("no ranks: there is no query to score")
    recalls = {}
    for k in RECALLS_AT:
        found = int((rank_Q <= k).sum())
        low, high = wilson_interval(found, num_queries)
        recalls[k] = RecallScore(found, 100 * found / num_queries, 100 * low, 100 * high)
    return RetrievalScore(recalls, float(rank_Q.double().quantile(0.5)), num_queries)
