"""Multi-instance retrieval as EPIC-KITCHENS-100 scores it (arXiv 2006.13256, section 5.5; official code in
mwray/Joint-Part-of-Speech-Embeddings): captions fit clips to a degree. Pure: matrices in, numbers out.

Rows are queries, columns candidates; hand in both matrices transposed for the other direction. Sums are in float64.
Where candidates are equally similar, the less relevant one is taken to come first; the official code leaves their
order to the sort.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64


@dataclass(frozen=True, slots=True)
class MultiInstanceScore:
    """One direction, in percent. `official_map` is the mAP of published tables, see `average_precision`."""

    mean_average_precision: float
    official_map: float
    ndcg: float
    num_queries: int


def relevancy(
    verbs_QV: Bool[np.ndarray, "Q V"],
    nouns_QU: Bool[np.ndarray, "Q U"],
    verbs_CV: Bool[np.ndarray, "C V"],
    nouns_CU: Bool[np.ndarray, "C U"],
) -> Float64[np.ndarray, "Q C"]:
    """How much each pair has in common, 0 to 1: the mean of shared verbs over all verbs, and the same of nouns.

    Classes are multi-hot. Raises ValueError for a row without any verb, or without any noun.
    """
    return (_overlap(verbs_QV, verbs_CV, "verb") + _overlap(nouns_QU, nouns_CU, "noun")) / 2


def _overlap(own_QX: np.ndarray, other_CX: np.ndarray, what: str) -> np.ndarray:
    for classes in (own_QX, other_CX):
        bare = np.flatnonzero(~classes.any(axis=1))
        if len(bare):
            raise ValueError(
                f"rows {bare[:5].tolist()} have no {what} class, so nothing can be said of what fits them"
            )
    own, other = own_QX.astype(np.float64), other_CX.astype(np.float64)
    shared_QC = own @ other.T
    return shared_QC / (own.sum(axis=1)[:, None] + other.sum(axis=1) - shared_QC)


def average_precision(
    similarity_QC: Float[np.ndarray, "Q C"],
    relevance_QC: Float[np.ndarray, "Q C"],
    partial_relevance_counts: bool = False,
) -> Float64[np.ndarray, " Q"]:
    """Average precision of each query, 0 to 1; right are the candidates of relevance 1.

    With `partial_relevance_counts` the precision at a right candidate is the sum of all relevances so far over its
    rank, also of those below 1: so the official code has it, whose numbers are therefore higher. Raises ValueError
    for matrices that do not fit together or are not finite, and for a query with nothing of relevance 1.
    """
    ranked_QC = _relevance_as_ranked(similarity_QC, relevance_QC)
    is_right_QC = ranked_QC == 1
    num_right_Q = is_right_QC.sum(axis=1)
    _require_all(num_right_Q > 0, "nothing of relevance 1")
    gained_QC = ranked_QC if partial_relevance_counts else is_right_QC.astype(np.float64)
    precision_QC = gained_QC.cumsum(axis=1) / np.arange(1, ranked_QC.shape[1] + 1)
    return (precision_QC * is_right_QC).sum(axis=1) / num_right_Q


def ndcg(
    similarity_QC: Float[np.ndarray, "Q C"], relevance_QC: Float[np.ndarray, "Q C"]
) -> Float64[np.ndarray, " Q"]:
    """Normalised discounted cumulative gain of each query, 0 to 1, over its first K ranks: K is the number of
    candidates with a relevance above 0.

    Raises ValueError for matrices that do not fit together or are not finite, and for a query with nothing relevant.
    """
    ranked_QC = _relevance_as_ranked(similarity_QC, relevance_QC)
    num_relevant_Q = (relevance_QC > 0).sum(axis=1)
    _require_all(num_relevant_Q > 0, "nothing relevant")
    ranks = np.arange(1, ranked_QC.shape[1] + 1)
    weight_QC = np.where(ranks <= num_relevant_Q[:, None], 1 / np.log2(ranks + 1), 0.0)
    ideal_QC = -np.sort(-relevance_QC.astype(np.float64), axis=1)
    return (ranked_QC * weight_QC).sum(axis=1) / (ideal_QC * weight_QC).sum(axis=1)


def multi_instance_score(
    similarity_QC: Float[np.ndarray, "Q C"], relevance_QC: Float[np.ndarray, "Q C"]
) -> MultiInstanceScore:
    """Means over the queries. Raises ValueError as `average_precision` and `ndcg` do."""
    return MultiInstanceScore(
        100 * float(average_precision(similarity_QC, relevance_QC).mean()),
        100 * float(average_precision(similarity_QC, relevance_QC, partial_relevance_counts=True).mean()),
        100 * float(ndcg(similarity_QC, relevance_QC).mean()),
        len(similarity_QC),
    )


def _relevance_as_ranked(similarity_QC: np.ndarray, relevance_QC: np.ndarray) -> np.ndarray:
    if similarity_QC.ndim != 2 or similarity_QC.shape != relevance_QC.shape or similarity_QC.size == 0:
        raise ValueError(
            f"similarity has shape {similarity_QC.shape} and relevance {relevance_QC.shape}; both must be (queries, "
            "candidates), and neither empty"
        )
    _require_all(np.all(np.isfinite(similarity_QC), axis=1), "a similarity that is not finite")
    _require_all(np.all((relevance_QC >= 0) & (relevance_QC <= 1), axis=1), "a relevance outside 0..1")
    order_QC = np.lexsort((relevance_QC, -similarity_QC), axis=1)
    return np.take_along_axis(relevance_QC.astype(np.float64), order_QC, axis=1)


def _require_all(is_good_Q: Bool[np.ndarray, " Q"], what: str) -> None:
    if not is_good_Q.all():
        bad = np.flatnonzero(~is_good_Q)
        raise ValueError(f"{len(bad)} queries have {what}, first {bad[:5].tolist()}")
