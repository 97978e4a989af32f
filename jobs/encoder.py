"""Held-out clips and captions to features and matching scores, by all ranks together.

Work is dealt out in whole batches whose content does not depend on the number of ranks: products of matrices round
differently in batches of another size, and a score has to be the same to the last digit however it was computed. For
that every rank needs as many compute threads as any other time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jobs.batch_work import normalise
from jobs.ranks import Ranks
from model.video_text_model import VideoTextModel
from pipeline.config import LoaderConfig
from pipeline.loader import FrameOrder, eval_batches
from pipeline.store import ClipStore
from pipeline.text import CaptionTokenizer

ItemT = TypeVar("ItemT")


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

    @property
    def captions_per_batch(self) -> int:
        """A caption costs a fraction of a clip."""
        return 4 * self.batch_size

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> Float[Tensor, "N P"]:
        """Text features of the given captions, float32 on the CPU."""
        features = [torch.zeros(0, self.model.config.joint_width)]
        for first in range(0, len(captions), self.captions_per_batch):
            ids_BL, mask_BL = self.tokenizer(captions[first : first + self.captions_per_batch])
            text = self.model.encode_text(ids_BL.to(self.device), mask_BL.to(self.device))
            features.append(text.features_BP.float().cpu())
        return torch.cat(features)

    def questions_per_batch(self, num_choices: int) -> int:
        """Questions whose clips make one batch."""
        return max(1, self.batch_size // num_choices)

    @torch.no_grad()
    def matches(
        self, store: ClipStore, captions: Sequence[str], rows_QK: Int64[np.ndarray, "Q K"]
    ) -> Float[Tensor, "Q K"]:
        """Log odds that caption q belongs to the clip of row rows_QK[q, k], by fusion layers and matching head; float32
        on the CPU. Probabilities would say the same, but tie where they round to 1.

        Clips are encoded for each question anew: their tokens are too many to keep, and a clip of EgoMCQ stands in one
        question as a rule.
        """
        num_choices = rows_QK.shape[1]
        size = self.questions_per_batch(num_choices)
        num_frames = self.model.config.video.num_frames
        batches = eval_batches(
            store, rows_QK.flatten(), self.tokenizer, self.loader, num_frames, size * num_choices
        )
        scores = [torch.zeros(0, num_choices)]
        for first, batch in zip(range(0, len(captions), size), batches, strict=True):
            ids_QL, mask_QL = (
                part.to(self.device) for part in self.tokenizer(captions[first : first + size])
            )
            text = self.model.encode_text(ids_QL, mask_QL)
            video = self.model.encode_video(normalise(batch.video_BTCHW, self.device, torch.float32))
            own = torch.arange(len(ids_QL), device=self.device).repeat_interleave(num_choices)
            fused = self.model.fuse(text.states_BLD[own], mask_QL[own], video.tokens_BMD)
            logits_P2 = self.model.matching_logits(fused.states_QLD).float()
            scores.append((logits_P2[:, 1] - logits_P2[:, 0]).view(-1, num_choices).cpu())
        return torch.cat(scores)


def by_all_ranks(
    ranks: Ranks, items: Sequence[ItemT], batch_size: int, compute: Callable[[list[ItemT]], Tensor]
) -> Tensor:
    """One row for each item, in their order, on every rank: batches go to the ranks in turn, none twice. Collective.

    `compute` gets the items of this rank's batches in one list, possibly an empty one, and returns their rows.
    """
    batches = [items[first : first + batch_size] for first in range(0, len(items), batch_size)]
    own = compute([item for batch in batches[ranks.rank :: ranks.world_size] for item in batch])
    by_rank = [rows.split(batch_size) for rows in ranks.gather(own)]
    return torch.cat(
        [by_rank[i % ranks.world_size][i // ranks.world_size] for i in range(len(batches))] or [own]
    )


class HeldOutClips:
    """The clips of a store as a model sees them. Each is encoded once in each order of its frames, however many scores
    look at it. Every method is collective.
    """

    def __init__(self, encoder: Encoder, store: ClipStore, ranks: Ranks) -> None:
        self.encoder, self.store, self.ranks = encoder, store, ranks
        encoder.model.eval()
        self._places: dict[FrameOrder, dict[int, int]] = {}
        self._features: dict[FrameOrder, Tensor] = {}

    def video(self, rows: Sequence[int], frame_order: FrameOrder = "ordered") -> Float[Tensor, "N P"]:
        """Features of rows of the store, float32, unit norm."""
        places = self._places.setdefault(frame_order, {})
        new = sorted(set(rows) - places.keys())
        if new:
            encoded = by_all_ranks(
                self.ranks,
                new,
                self.encoder.batch_size,
                lambda own: self.encoder.clips(self.store, own, frame_order),
            )
            places.update(zip(new, range(len(places), len(places) + len(new)), strict=True))
            known = self._features.get(frame_order)
            self._features[frame_order] = encoded if known is None else torch.cat([known, encoded])
        return self._features[frame_order][[places[row] for row in rows]]

    def text(self, captions: Sequence[str]) -> Float[Tensor, "N P"]:
        """Features of captions, float32, unit norm."""
        return by_all_ranks(self.ranks, captions, self.encoder.captions_per_batch, self.encoder.captions)

    def matches(self, captions: Sequence[str], rows_QK: Int64[np.ndarray, "Q K"]) -> Float[Tensor, "Q K"]:
        """Log odds of the matching head, see `Encoder.matches`."""
        return by_all_ranks(
            self.ranks,
            range(len(captions)),
            self.encoder.questions_per_batch(rows_QK.shape[1]),
            lambda own: self.encoder.matches(self.store, [captions[q] for q in own], rows_QK[own]),
        )
