"""The order of clips: a pure function of (seed, epoch, step).

It knows nothing of world size, loader threads or restarts; a rank takes its slice of the global batch.
Shuffling permutes shards and then shuffles inside windows of k shards, so that a remote store is read in
large pieces. All draws are keyed (Philox for an epoch, a counter hash for single rows); no generator has a
state to save.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Integer, UInt64

from pipeline.errors import DataError


def keyed_generator(seed: int, purpose: str, *key: int | str) -> np.random.Generator:
    """A generator that depends on its arguments only: the same draws on every machine, rank and restart."""
    text = "\x1f".join((str(seed), purpose, *(str(part) for part in key)))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64)))


def steps_per_epoch(num_clips: int, global_batch_size: int) -> int:
    """Whole global batches in an epoch; the remainder is left out, another one in every epoch."""
    if global_batch_size < 1:
        raise DataError(f"global batch of {global_batch_size} clips; expected at least 1")
    steps = num_clips // global_batch_size
    if steps == 0:
        raise DataError(
            f"an epoch has {num_clips} clips, fewer than one global batch of {global_batch_size}; "
            f"lower the global batch to {num_clips} or less, or prepare more clips"
        )
    return steps


def epoch_order(
    seed: int, epoch: int, shard_sizes: Sequence[int], window_shards: int
) -> Int64[np.ndarray, " clips"]:
    """All row numbers 0 .. sum(shard_sizes) - 1 in the order of this epoch, each exactly once.

    Shards are permuted, `window_shards` consecutive ones form a window, and rows are shuffled within their
    window.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    if window_shards < 1 or (sizes < 0).any():
        raise DataError(
            f"window of {window_shards} shards over sizes {sizes.tolist()}; expected positive numbers"
        )
    starts = np.concatenate([[0], np.cumsum(sizes)])
    generator = keyed_generator(seed, "epoch order", epoch)
    permuted = generator.permutation(len(sizes))
    pieces: list[np.ndarray] = []
    for first in range(0, len(permuted), window_shards):
        window = permuted[first : first + window_shards]
        rows = np.concatenate([np.arange(int(starts[shard]), int(starts[shard + 1])) for shard in window])
        pieces.append(generator.permutation(rows))
    return np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, dtype=np.int64)


def batch_ids(
    seed: int, step: int, shard_sizes: Sequence[int], global_batch_size: int, window_shards: int = 8
) -> Int64[np.ndarray, " batch"]:
    """Row numbers of the global batch of `step` (0-based, counted over all epochs). The readable reference.

    epoch = step // steps_per_epoch. Raises DataError when an epoch holds less than one global batch.
    """
    return SampleOrder(seed, tuple(shard_sizes), global_batch_size, window_shards).batch_ids(step)


class SampleOrder:
    """`batch_ids` for many steps: keeps the order of the epoch at hand instead of computing it for every
    step.
    """

    def __init__(
        self, seed: int, shard_sizes: Sequence[int], global_batch_size: int, window_shards: int = 8
    ) -> None:
        self.seed = seed
        self.shard_sizes = tuple(int(size) for size in shard_sizes)
        self.global_batch_size = global_batch_size
        self.window_shards = window_shards
        self.steps_per_epoch = steps_per_epoch(sum(self.shard_sizes), global_batch_size)
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def epoch_of(self, step: int) -> int:
        """The epoch a step belongs to, from 0."""
        if step < 0:
            raise DataError(f"step is {step}; expected 0 or more")
        return step // self.steps_per_epoch

    def batch_ids(self, step: int) -> Int64[np.ndarray, " batch"]:
        """Row numbers of the global batch of `step`."""
        epoch = self.epoch_of(step)
        if epoch != self._epoch:
            self._order = epoch_order(self.seed, epoch, self.shard_sizes, self.window_shards)
            self._epoch = epoch
        first = (step % self.steps_per_epoch) * self.global_batch_size
        return self._order[first : first + self.global_batch_size].copy()


def rank_slice(
    ids: Int64[np.ndarray, " batch"], rank: int, world_size: int
) -> Int64[np.ndarray, " local_batch"]:
    """The consecutive share of `rank`: concatenated over ranks it is the global batch again."""
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size}; expected 0 <= rank < world size")
    if len(ids) % world_size:
        fitting = [size for size in range(1, len(ids) + 1) if len(ids) % size == 0][:12]
        raise DataError(
            f"a global batch of {len(ids)} does not divide over {world_size} ranks; "
            f"choose a multiple of {world_size}, or one of {fitting} ranks"
        )
    share = len(ids) // world_size
    return ids[rank * share : (rank + 1) * share]


@dataclass(frozen=True, slots=True)
class SceneIndex:
    """Rows grouped by scene (same video, same time bin), so that a companion is one array look-up.

    `members` lists all rows scene by scene; a row's scene is members[start : start + size], itself at
    `place`.
    """

    members: Int64[np.ndarray, " clips"]
    start: Int64[np.ndarray, " clips"]
    size: Int64[np.ndarray, " clips"]
    place: Int64[np.ndarray, " clips"]


def build_scene_index(
    video_of_row: Integer[np.ndarray, " clips"],
    narration_s: Float64[np.ndarray, " clips"],
    bin_s: float = 60.0,
) -> SceneIndex:
    """Scenes as fixed bins of `bin_s` seconds of the narration time (EgoVLP's scene-aware bucket).

    `video_of_row` has one number a video.
    """
    bin_of_row = np.floor(np.asarray(narration_s, dtype=np.float64) / bin_s).astype(np.int64)
    members = np.lexsort((np.arange(len(bin_of_row)), bin_of_row, video_of_row)).astype(np.int64)
    video, time_bin = video_of_row[members], bin_of_row[members]
    is_first = np.ones(len(members), dtype=np.bool_)
    is_first[1:] = (video[1:] != video[:-1]) | (time_bin[1:] != time_bin[:-1])
    firsts = np.flatnonzero(is_first)
    sizes = np.diff(np.append(firsts, len(members)))
    scene_of_member = np.cumsum(is_first) - 1
    start, size, place = (np.empty(len(members), dtype=np.int64) for _ in range(3))
    start[members] = firsts[scene_of_member]
    size[members] = sizes[scene_of_member]
    place[members] = np.arange(len(members)) - firsts[scene_of_member]
    return SceneIndex(members, start, size, place)


def scene_companions(
    index: SceneIndex, ids: Int64[np.ndarray, " batch"], seed: int, step: int
) -> Int64[np.ndarray, " batch"]:
    """For every anchor another clip of its scene, drawn evenly; the anchor itself only when it is alone
    there.

    The draw is keyed by (seed, step, row), so any slice of the batch gives the same companions as the whole.
    """
    ids = np.asarray(ids, dtype=np.int64)
    key = keyed_generator(seed, "scene companions", step).integers(0, 2**63, dtype=np.uint64)
    others = np.maximum(index.size[ids] - 1, 1)
    draw = (
        _mix(ids.astype(np.uint64) ^ _mix(np.asarray([key], dtype=np.uint64))) % others.astype(np.uint64)
    ).astype(np.int64)
    draw = draw + (draw >= index.place[ids])
    alone = index.size[ids] == 1
    return np.where(alone, ids, index.members[index.start[ids] + np.where(alone, 0, draw)])


def _mix(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection on 64 bits whose output bits look
    independent.
    """
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
