"""Text-video retrieval over all held-out clips, both ways.

Captions that are the same to the model are one query, which any of their clips answers; a clip has one right caption.
Similarities are computed in parts by the first rank: all of them at once would be 160 GB for EgoMCQ's clips.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jobs.encoder import HeldOutClips
from model.metrics import RetrievalScore, retrieval_score, target_ranks
from pipeline.store import ClipStore
from pipeline.text import CaptionTokenizer

TEXT_TO_VIDEO, VIDEO_TO_TEXT = "eval/retrieval/text_to_video", "eval/retrieval/video_to_text"
_SIMILARITIES_AT_ONCE = 2**24
_CAPTIONS_AT_ONCE = 4096


@dataclass(frozen=True)
class RetrievalEvaluation:
    """Scores under their metric names."""

    scores: dict[str, RetrievalScore]

    def metrics(self) -> dict[str, float]:
        """Flat names and numbers for the journal; recalls and intervals in percent."""
        flat: dict[str, float] = {}
        for name, score in self.scores.items():
            for k, found in score.recalls.items():
                flat |= {
                    f"{name}_r{k}": found.recall,
                    f"{name}_r{k}_low": found.interval_low,
                    f"{name}_r{k}_high": found.interval_high,
                }
            flat |= {f"{name}_median_rank": score.median_rank, f"{name}_n": float(score.num_queries)}
        return flat


def score_retrieval(clips: HeldOutClips) -> RetrievalEvaluation:
    """Recall at 1, 5 and 10 and the median rank over the whole store. Collective; ties count against the query."""
    captions, caption_of_clip_N = distinct_captions(clips.store, clips.encoder.tokenizer)
    video_NP, text_CP = clips.video(range(len(clips.store))), clips.text(captions)
    result = None
    if clips.ranks.rank == 0:
        result = RetrievalEvaluation(_scores(text_CP, video_NP, torch.from_numpy(caption_of_clip_N)))
    return clips.ranks.gather(result)[0]


def distinct_captions(
    store: ClipStore, tokenizer: CaptionTokenizer
) -> tuple[list[str], Int[np.ndarray, " N"]]:
    """Captions that differ as token ids, and for each clip the place of its own among them."""
    captions = [store.caption(row) for row in range(len(store))]
    places: dict[bytes, int] = {}
    distinct: list[str] = []
    caption_of_clip_N = np.empty(len(captions), dtype=np.int64)
    for first in range(0, len(captions), _CAPTIONS_AT_ONCE):
        part = captions[first : first + _CAPTIONS_AT_ONCE]
        for row, (caption, ids_L) in enumerate(zip(part, tokenizer(part)[0].numpy(), strict=True), first):
            key = ids_L.tobytes()
            if key not in places:
                places[key] = len(distinct)
                distinct.append(caption)
            caption_of_clip_N[row] = places[key]
    return distinct, caption_of_clip_N


def _scores(text_CP: Tensor, video_NP: Tensor, caption_of_clip_N: Tensor) -> dict[str, RetrievalScore]:
    def clips_of(part: slice) -> Bool[Tensor, "q N"]:
        return torch.arange(len(text_CP))[part, None] == caption_of_clip_N

    return {
        TEXT_TO_VIDEO: retrieval_score(_ranks(text_CP, video_NP, clips_of)),
        VIDEO_TO_TEXT: retrieval_score(_ranks(video_NP, text_CP, lambda part: caption_of_clip_N[part])),
    }


def _ranks(
    query_QP: Float[Tensor, "Q P"], candidate_CP: Float[Tensor, "C P"], targets: Callable[[slice], Tensor]
) -> Int[Tensor, " Q"]:
    size = max(1, _SIMILARITIES_AT_ONCE // len(candidate_CP))
    parts = [slice(first, first + size) for first in range(0, len(query_QP), size)]
    return torch.cat([target_ranks(query_QP[part] @ candidate_CP.T, targets(part)) for part in parts])
