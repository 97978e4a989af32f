"""Scores of one model: EgoMCQ inter and intra, by features or by the matching head, and the temporal probe.

Every distinct clip is encoded once, split over the ranks without padding; questions are scored on features gathered
to every rank. Questions that lost a clip at preparation are counted, never scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jobs.answers import Answer, make_answers
from jobs.encoder import Encoder, HeldOutClips
from jobs.ranks import Ranks
from model.metrics import McqScore, egomcq_accuracy, egomcq_scores
from pipeline.loader import FrameOrder
from pipeline.questions import McqQuestion, McqSet
from pipeline.store import ClipStore

__all__ = ["Encoder", "Evaluation", "EvaluationError", "score_by_matching", "score_egomcq", "score_questions"]

INTER, INTRA = "eval/egomcq/inter_video", "eval/egomcq/intra_video"
MATCHED_INTER, MATCHED_INTRA = "eval/egomcq_vtm/inter_video", "eval/egomcq_vtm/intra_video"
PROBE_ORDERED, PROBE_SHUFFLED = "eval/temporal_probe/ordered", "eval/temporal_probe/shuffled"
PROBE_REVERSED = "eval/temporal_probe/reversed"
_KIND_NAMES = {"inter": INTER, "intra": INTRA}
_MATCHED_KIND_NAMES = {"inter": MATCHED_INTER, "intra": MATCHED_INTRA}
_PROBE_NAMES: dict[FrameOrder, str] = {
    "ordered": PROBE_ORDERED,
    "shuffled": PROBE_SHUFFLED,
    "reversed": PROBE_REVERSED,
}


class EvaluationError(RuntimeError):
    """A score that cannot be given."""


@dataclass(frozen=True)
class Evaluation:
    """Scores under their metric names; kinds without questions are absent. The temporal probe scores the intra
    questions that have the reversed verb among their distractors: with frames in order, shuffled and backwards.
    `answers` are those to all readable questions, frames in order.
    """

    scores: dict[str, McqScore]
    num_unreadable: int
    answers: tuple[Answer, ...] = ()

    def metrics(self) -> dict[str, float]:
        """Flat names and numbers for the journal; accuracies and intervals in percent."""
        flat = {"eval/egomcq/num_unreadable": float(self.num_unreadable)}
        for name, score in self.scores.items():
            flat |= {
                f"{name}_acc": score.accuracy,
                f"{name}_low": score.interval_low,
                f"{name}_high": score.interval_high,
                f"{name}_n": float(score.num_scored),
                f"{name}_ties": float(score.num_ties),
            }
        if PROBE_ORDERED in self.scores:
            margin = self.scores[PROBE_ORDERED].accuracy - self.scores[PROBE_SHUFFLED].accuracy
            flat["eval/temporal_probe/margin"] = margin
        return flat


def score_egomcq(
    encoder: Encoder, store: ClipStore, mcq: McqSet, ranks: Ranks, max_unreadable_share: float
) -> Evaluation:
    """Scores all readable questions. Collective: every rank encodes its share and returns the same result.

    Raises EvaluationError when more questions are unreadable than allowed, or none is readable.
    """
    return score_questions(HeldOutClips(encoder, store, ranks), mcq, max_unreadable_share)


def score_questions(
    clips: HeldOutClips, mcq: McqSet, max_unreadable_share: float, with_probe: bool = True
) -> Evaluation:
    """The same on clips that other scores look at too."""
    _require_readable(mcq, max_unreadable_share)
    scores_QK = _feature_scores(clips, mcq.questions, "ordered")
    scores = {_KIND_NAMES[kind]: score for kind, score in _accuracy(scores_QK, mcq.questions).items()}
    probe = [question for question in mcq.questions if question.is_probe]
    if probe and with_probe:
        for frame_order, name in _PROBE_NAMES.items():
            scores[name] = _accuracy(_feature_scores(clips, probe, frame_order), probe)["intra"]
    return Evaluation(scores, len(mcq.unreadable), make_answers(mcq.questions, scores_QK))


def score_by_matching(clips: HeldOutClips, mcq: McqSet, max_unreadable_share: float) -> Evaluation:
    """All readable questions by fusion layers and matching head, all five clips of each. Collective.

    Every clip is encoded again, so it takes longer than by features. Raises EvaluationError as `score_egomcq` does,
    and for a model whose matching head was not trained.
    """
    _require_readable(mcq, max_unreadable_share)
    config = clips.encoder.model.config
    if config.vtm_weight == 0 or config.text.num_fusion_layers == 0:
        raise EvaluationError(
            f"the model has {config.text.num_fusion_layers} fusion layers and was trained with vtm_weight "
            f"{config.vtm_weight}: it has no matching head to score with; leave --vtm out"
        )
    choices = [clip_id for question in mcq.questions for clip_id in question.choices]
    rows_QK = clips.store.rows_of(choices).reshape(len(mcq.questions), -1)
    scores_QK = clips.matches([question.caption for question in mcq.questions], rows_QK)
    by_kind = _accuracy(scores_QK, mcq.questions)
    scores = {_MATCHED_KIND_NAMES[kind]: score for kind, score in by_kind.items()}
    return Evaluation(scores, len(mcq.unreadable), make_answers(mcq.questions, scores_QK))


def _require_readable(mcq: McqSet, max_unreadable_share: float) -> None:
    if len(mcq.unreadable) > max_unreadable_share * mcq.num_total or not mcq.questions:
        raise EvaluationError(
            f"{len(mcq.unreadable)} of {mcq.num_total} EgoMCQ questions lost a clip at preparation (allowed: "
            f"{max_unreadable_share:.1%}); see rejected.jsonl beside the shards, repair the videos and run "
            f"prepare again, or raise evaluation.max_unreadable_share"
        )


def _accuracy(scores_QK: Tensor, questions: Sequence[McqQuestion]) -> dict[str, McqScore]:
    answers_Q = torch.tensor([question.answer for question in questions])
    return egomcq_accuracy(scores_QK, answers_Q, [question.kind for question in questions])


def _feature_scores(
    clips: HeldOutClips, questions: Sequence[McqQuestion], frame_order: FrameOrder
) -> Float[Tensor, "Q K"]:
    clip_ids = [clip_id for question in questions for clip_id in question.choices]
    video_XP = clips.video(clips.store.rows_of(clip_ids).tolist(), frame_order)
    video_QKP = video_XP.unflatten(0, (len(questions), -1))
    return egomcq_scores(clips.text([question.caption for question in questions]), video_QKP)
