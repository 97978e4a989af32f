"""Every wrong pair is fused once, where its clip is; ranks make equal calls."""

import numpy as np
import pytest

from jobs.pair_plan import WRONG_PAIRS_PER_ROW, BatchSplit, PairChunk, plan_pairs


def _pairs(chunks: list[PairChunk], first_row: int, size: int) -> list[tuple[int, int]]:
    """(caption, clip) as rows of the whole batch, padding left out."""
    found = []
    for chunk in chunks:
        captions = np.concatenate([np.arange(first_row, first_row + size), chunk.foreign_F])
        counted = chunk.weight_Q > 0
        found += zip(captions[chunk.caption_Q][counted], first_row + chunk.clip_Q[counted], strict=True)
    return found


@pytest.mark.parametrize(("world_size", "rows", "micro"), [(1, 12, 12), (1, 12, 5), (2, 6, 4), (3, 4, 1)])
def test_each_pair_is_fused_once_and_ranks_agree(world_size: int, rows: int, micro: int) -> None:
    random = np.random.default_rng(0)
    num_rows = world_size * rows
    wrong_clip = random.integers(0, num_rows, num_rows)
    wrong_clip[: num_rows // 2] = 1  # a popular clip
    wrong_caption = random.integers(0, num_rows, num_rows)
    has_negative = random.random(num_rows) < 0.8
    split = BatchSplit(world_size, rows, micro)
    plans = [plan_pairs(wrong_clip, wrong_caption, has_negative, split, rank) for rank in range(world_size)]
    found = []
    for rank, plan in enumerate(plans):
        for piece, chunks in zip(split.micro_batches(), plan, strict=True):
            found += _pairs(chunks, rank * rows + piece.start, piece.stop - piece.start)
    kept = np.flatnonzero(has_negative)
    expected = [(row, wrong_clip[row]) for row in kept] + [(wrong_caption[row], row) for row in kept]
    assert sorted(found) == sorted(expected)
    shapes = [[[(len(c.foreign_F), len(c.caption_Q)) for c in chunks] for chunks in plan] for plan in plans]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(len(c.caption_Q) <= WRONG_PAIRS_PER_ROW * micro for plan in plans for cs in plan for c in cs)


def test_a_popular_clip_is_fused_in_several_chunks() -> None:
    wrong_clip, rows = np.zeros(9, dtype=np.int64), np.arange(9)
    (chunks,) = plan_pairs(wrong_clip, (rows + 1) % 9, rows > 0, BatchSplit(1, 9, 9), 0)
    assert [len(chunk.caption_Q) for chunk in chunks] == [16]
    first, *_ = plan_pairs(wrong_clip, (rows + 1) % 9, rows > 0, BatchSplit(1, 9, 2), 0)
    assert [len(chunk.caption_Q) for chunk in first] == [6, 3]


def test_the_last_micro_batch_may_be_shorter() -> None:
    assert BatchSplit(1, 7, 3).micro_batches() == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert BatchSplit(1, 6, 6).micro_batches() == [slice(0, 6)]


def test_without_negatives_there_are_no_pairs() -> None:
    rows = np.arange(4)
    ((chunk,),) = plan_pairs(rows, rows, rows < 0, BatchSplit(1, 4, 4), 0)
    assert len(chunk.caption_Q) == 0
    assert len(chunk.foreign_F) == 0
