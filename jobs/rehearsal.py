"""The most that a step can cost: what a stage rehearses before it starts, and what the planner computes with.

A step's memory depends on what is drawn (words hidden, wrong captions that meet a micro-batch's clips). A rehearsal
takes the most that comes up: longest captions, as many hidden words as one micro-batch in ten thousand has, full
lists of wrong pairs with captions from elsewhere. It works on two micro-batches, since from the second on there are
gradients to hold, and on the whole batch where only features are looked at.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from jobs.batch_work import BatchFeatures, BatchWork
from jobs.pair_plan import WRONG_PAIRS_PER_ROW, PairChunk
from model.config import ModelConfig
from model.objective import HiddenWords
from pipeline.loader import Batch

_MICRO_BATCHES = 2
# Standard deviations above the mean number of hidden words.
_DEVIATIONS = 4


def rehearsal_batch(
    config: ModelConfig,
    num_clips: int,
    micro_batch_size: int | None,
    text_length: int,
    num_tags: tuple[int, int],
    rank: int = 0,
) -> Batch:
    """`num_clips` clips of a rank with the longest captions; black frames, for those that are encoded.

    `num_tags` are the numbers of verb and noun classes. Tensors lie on numpy's memory, as a loader's do.
    """
    video, text = config.video, config.text
    num_encoded = min(num_clips, _MICRO_BATCHES * (micro_batch_size or num_clips))
    frames = (video.num_frames, 3, video.image_size, video.image_size)
    ids = np.full((num_clips, text_length), text.mask_id)
    ids[:, 0] = text.cls_id
    return Batch(
        video_BTCHW=torch.from_numpy(np.zeros((num_encoded, *frames), np.uint8)),
        text_ids_BL=torch.from_numpy(ids),
        text_mask_BL=torch.from_numpy(np.ones((num_clips, text_length), bool)),
        verbs_BV=torch.from_numpy(np.zeros((num_clips, num_tags[0]), bool)),
        nouns_BU=torch.from_numpy(np.zeros((num_clips, num_tags[1]), bool)),
        clip_ids=("rehearsal",) * num_clips,
        index_B=torch.from_numpy(np.arange(num_clips) + rank * num_clips),
    )


class RehearsalWork(BatchWork):
    """The first micro-batches of a batch, at their most expensive."""

    def pieces(self) -> list[slice]:
        return self.split.micro_batches()[:_MICRO_BATCHES]

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        encoded = torch.cat(list(parts))
        return torch.nn.functional.pad(encoded, (0, 0, 0, self.split.rows_per_rank - len(encoded)), value=1.0)

    def count_words(self) -> int:
        return 0 if self.masked is None else sum(self._num_words(piece) for piece in self.pieces())

    def hidden(self, piece: slice) -> HiddenWords | None:
        if self.masked is None:
            return None
        captions = self.captions.rows(piece)
        places = captions.ids_BL.new_zeros(self._num_words(piece)) + 1
        return HiddenWords(captions.ids_BL, places, places)

    def _num_words(self, piece: slice) -> int:
        length, chance = self.batch.text_ids_BL.shape[1], self.config.mlm_probability
        most = (piece.stop - piece.start) * (length - 1)  # [CLS] is never hidden
        return min(most, math.ceil(most * chance + _DEVIATIONS * math.sqrt(most * chance * (1 - chance))))

    def plan_negatives(
        self, features: BatchFeatures
    ) -> tuple[list[list[PairChunk | None]], Bool[Tensor, " B"]]:
        if not self.config.vtm_weight:
            return super().plan_negatives(features)
        self.draw_negatives(features)
        chunks: list[list[PairChunk | None]] = [[self._chunk(piece)] for piece in self.pieces()]
        return chunks, torch.ones(self.split.rows_per_rank, dtype=torch.bool, device=self.engine.device)

    def _chunk(self, piece: slice) -> PairChunk:
        split, size = self.split, piece.stop - piece.start
        num_elsewhere = split.world_size * split.rows_per_rank - size
        # Where one rank holds the batch in one piece, each row has just its two wrong pairs.
        num_pairs = WRONG_PAIRS_PER_ROW * split.micro_batch_size if num_elsewhere else 2 * size
        num_foreign = min(num_pairs, num_elsewhere)
        return PairChunk(
            foreign_F=np.arange(num_foreign) % split.rows_per_rank,
            caption_Q=np.arange(num_pairs) % (size + num_foreign),
            clip_Q=np.arange(num_pairs) % size,
            weight_Q=np.ones(num_pairs, np.float32),
        )
