"""Scores of one model: EgoMCQ inter and intra, and the temporal probe.

Every distinct clip is encoded once, split over the ranks without padding; questions are scored on features gathered
to every rank. Questions that lost a clip at preparation are counted, never scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jobs.batch_work import normalise
from jobs.ranks import Ranks
from model.metrics import McqScore, egomcq_accuracy, egomcq_scores
from model.video_text_model import VideoTextModel
from pipeline.config import LoaderConfig
from pipeline.loader import FrameOrder, eval_batches
from pipeline.questions import McqQuestion, McqSet
from pipeline.store import ClipStore
from pipeline.text import CaptionTokenizer

INTER, INTRA = "eval/egomcq/inter_video", "eval/egomcq/intra_video"
PROBE_ORDERED, PROBE_SHUFFLED = "eval/temporal_probe/ordered", "eval/temporal_probe/shuffled"
_KIND_NAMES = {"inter": INTER, "intra": INTRA}


class EvaluationError(RuntimeError):
    """A score that cannot be given."""


@dataclass(frozen=True)
class Evaluation:
    """Scores under their metric names; kinds without questions are absent. The temporal probe scores the intra
    questions that have the reversed verb among their distractors, once with frames in order and once shuffled."""

    scores: dict[str, McqScore]
    num_unreadable: int

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


@dataclass(frozen=True)
class Encoder:
    """A model with what it needs to turn rows of a store into features; evaluation mode, no gradient."""

    model: VideoTextModel
    tokenizer: CaptionTokenizer
    loader: LoaderConfig
    batch_size: int
    device: torch.device

    @torch.no_grad()
    def clips(
        self, store: ClipStore, rows: Sequence[int], frame_order: FrameOrder = "ordered"
    ) -> Float[Tensor, "N P"]:
        """Video features of the given rows, float32 on the CPU."""
        num_frames = self.model.config.video.num_frames
        batches = eval_batches(
            store, rows, self.tokenizer, self.loader, num_frames, self.batch_size, frame_order
        )
        features = [
            self.model.encode_video(
                normalise(batch.video_BTCHW, self.device, torch.float32)
            ).features_BP.cpu()
            for batch in batches
        ]
        return torch.cat(features) if features else torch.zeros(0, self.model.config.joint_width)

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> Float[Tensor, "N P"]:
        """Text features of the given captions, float32 on the CPU."""
        features = []
        for first in range(0, len(captions), 4 * self.batch_size):
            ids_BL, mask_BL = self.tokenizer(captions[first : first + 4 * self.batch_size])
            features.append(
                self.model.encode_text(ids_BL.to(self.device), mask_BL.to(self.device)).features_BP
            )
        return torch.cat(features).float().cpu()


def score_egomcq(
    encoder: Encoder, store: ClipStore, mcq: McqSet, ranks: Ranks, max_unreadable_share: float
) -> Evaluation:
    """Scores all readable questions. Collective: every rank encodes its share and returns the same result.

    Raises EvaluationError when more questions are unreadable than allowed, or none is readable.
    """
    if len(mcq.unreadable) > max_unreadable_share * mcq.num_total or not mcq.questions:
        raise EvaluationError(
            f"{len(mcq.unreadable)} of {mcq.num_total} EgoMCQ questions lost a clip at preparation (allowed: "
            f"{max_unreadable_share:.1%}); see rejected.jsonl beside the shards, repair the videos and run "
            f"prepare again, or raise evaluation.max_unreadable_share"
        )
    encoder.model.eval()
    scores = _named(_score(encoder, store, mcq.questions, "ordered", ranks))
    probe = [question for question in mcq.questions if question.is_probe]
    if probe:
        scores[PROBE_ORDERED] = _score(encoder, store, probe, "ordered", ranks)["intra"]
        scores[PROBE_SHUFFLED] = _score(encoder, store, probe, "shuffled", ranks)["intra"]
    return Evaluation(scores, len(mcq.unreadable))


def _named(by_kind: dict[str, McqScore]) -> dict[str, McqScore]:
    return {_KIND_NAMES[kind]: score for kind, score in by_kind.items()}


def _score(
    encoder: Encoder,
    store: ClipStore,
    questions: Sequence[McqQuestion],
    frame_order: FrameOrder,
    ranks: Ranks,
) -> dict[str, McqScore]:
    clip_ids = sorted({clip_id for question in questions for clip_id in question.choices})
    position = {clip_id: index for index, clip_id in enumerate(clip_ids)}
    rows = store.rows_of(clip_ids)
    mine = np.arange(ranks.rank, len(rows), ranks.world_size)
    video_NP = torch.zeros(len(rows), encoder.model.config.joint_width)
    for owned, features in ranks.gather((mine, encoder.clips(store, rows[mine].tolist(), frame_order))):
        video_NP[torch.from_numpy(owned)] = features
    choices_QK = torch.tensor([[position[clip_id] for clip_id in question.choices] for question in questions])
    scores_QK = egomcq_scores(encoder.captions([q.caption for q in questions]), video_NP[choices_QK])
    answers_Q = torch.tensor([question.answer for question in questions])
    return egomcq_accuracy(scores_QK, answers_Q, [question.kind for question in questions])
