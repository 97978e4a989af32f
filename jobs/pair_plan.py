"""Which caption and clip are fused where: the wrong pairs of a batch, dealt out to ranks and micro-batches.

A pair is fused where its clip is, because a clip's tokens are large and a caption is encoded again for next to
nothing. So each micro-batch gets the wrong captions of its own clips, and the captions of any rank whose wrong clip it
holds. Ranks that shard parameters must make equal calls: shorter lists are padded with pairs of weight 0.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

# Wrong pairs fused at once, per row of the micro-batch. Two is the mean; popular clips have more.
WRONG_PAIRS_PER_ROW = 3


@dataclass(frozen=True, slots=True)
class PairChunk:
    """Wrong pairs to fuse at once. Captions count through the micro-batch's rows, then through `foreign_F`."""

    foreign_F: Int[np.ndarray, " F"]  # rows of the whole batch
    caption_Q: Int[np.ndarray, " Q"]
    clip_Q: Int[np.ndarray, " Q"]  # rows of the micro-batch
    weight_Q: Float[np.ndarray, " Q"]


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """How the batch lies: each rank holds `rows_per_rank` rows, cut into pieces of `micro_batch_size`."""

    world_size: int
    rows_per_rank: int
    micro_batch_size: int

    def micro_batches(self) -> list[slice]:
        """This rank's rows, piece by piece; the last piece may be shorter."""
        ends = range(self.micro_batch_size, self.rows_per_rank + self.micro_batch_size, self.micro_batch_size)
        return [slice(end - self.micro_batch_size, min(end, self.rows_per_rank)) for end in ends]


def plan_pairs(
    wrong_clip_G: Int[np.ndarray, " G"],
    wrong_caption_G: Int[np.ndarray, " G"],
    has_negative_G: np.ndarray,
    split: BatchSplit,
    rank: int,
) -> list[list[PairChunk]]:
    """Chunks of wrong pairs for each micro-batch of `rank`, from the negatives of all G rows."""
    rows_G = np.flatnonzero(has_negative_G)
    captions = np.concatenate([rows_G, wrong_caption_G[rows_G]])
    clips = np.concatenate([wrong_clip_G[rows_G], rows_G])
    plans = []
    for piece in split.micro_batches():
        starts = [r * split.rows_per_rank + piece.start for r in range(split.world_size)]
        size = piece.stop - piece.start
        held = [np.flatnonzero((clips >= start) & (clips < start + size)) for start in starts]
        limit = WRONG_PAIRS_PER_ROW * split.micro_batch_size
        num_chunks = max(1, *(-(-len(pairs) // limit) for pairs in held))
        chunks = []
        for number in range(num_chunks):
            parts = [pairs[number * limit : (number + 1) * limit] for pairs in held]
            foreign = [
                _outside(captions[part], start, size) for part, start in zip(parts, starts, strict=True)
            ]
            own, start = parts[rank], starts[rank]
            chunks.append(
                _chunk(
                    captions[own] - start,
                    clips[own] - start,
                    foreign[rank] - start,
                    size,
                    num_pairs=max(map(len, parts)),
                    num_foreign=max(map(len, foreign)),
                    first_row=start,
                )
            )
        plans.append(chunks)
    return plans


def _outside(captions: np.ndarray, start: int, size: int) -> np.ndarray:
    return np.unique(captions[(captions < start) | (captions >= start + size)])


def _chunk(
    captions: np.ndarray,
    clips: np.ndarray,
    foreign: np.ndarray,
    size: int,
    *,
    num_pairs: int,
    num_foreign: int,
    first_row: int,
) -> PairChunk:
    """All indices count from the micro-batch's first row; `foreign` is sorted."""
    is_own = (captions >= 0) & (captions < size)
    caption_Q = np.where(is_own, captions, size + np.searchsorted(foreign, captions))
    padding = num_pairs - len(captions)
    return PairChunk(
        foreign_F=np.pad(foreign, (0, num_foreign - len(foreign))) + first_row,
        caption_Q=np.pad(caption_Q, (0, padding)).astype(np.int64),
        clip_Q=np.pad(clips, (0, padding)).astype(np.int64),
        weight_Q=np.pad(np.ones(len(captions), np.float32), (0, padding)),
    )
