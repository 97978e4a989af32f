import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.order import (
    SampleOrder,
    batch_ids,
    build_scene_index,
    epoch_order,
    rank_slice,
    scene_companions,
    steps_per_epoch,
)

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), sizes=SIZES, window=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_every_clip_exactly_once(seed, epoch, sizes, window):
    order = epoch_order(seed, epoch, sizes, window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


@given(seed=st.integers(0, 99), sizes=SIZES, window=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_shuffling_stays_inside_windows_of_whole_shards(seed, sizes, window):
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[epoch_order(seed, 3, sizes, window)]
    first_seen = list(dict.fromkeys(shard_of.tolist()))
    assert len(first_seen) == np.count_nonzero(sizes)
    # While rows of a shard still come, at most `window` shards are under way.
    for position in range(len(shard_of)):
        under_way = set(shard_of[: position + 1]) & set(shard_of[position:])
        assert len(under_way) <= window


@given(
    seed=st.integers(0, 99),
    step=st.integers(0, 40),
    share=st.integers(1, 3),
    world_size=st.sampled_from([1, 2, 3, 4]),
)
@settings(max_examples=60, deadline=None)
def test_ranks_of_any_world_size_together_see_the_same_global_batch(seed, step, share, world_size):
    global_batch_size = 12 * share
    ids = batch_ids(seed, step, [10, 20, 15], global_batch_size)
    slices = [rank_slice(ids, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(slices).tolist() == ids.tolist()


@given(
    seed=st.integers(0, 2**40),
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    window=st.integers(1, 3),
    lives=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 9), st.integers(0, 3)), max_size=50),
)
@settings(max_examples=100, deadline=None)
def test_three_epochs_with_restarts_on_other_world_sizes_lose_and_double_nothing(seed, sizes, window, lives):
    sizes = [4, *sizes]
    num_steps = 3 * steps_per_epoch(sum(sizes), 4)
    seen, cursor = {}, 0
    # A life: world size, steps until it dies, how many of those its checkpoint had not kept. The last one survives.
    for world_size, num_steps_lived, num_lost in [*lives, (1, num_steps, 0)]:
        ranks = [SampleOrder(seed, sizes, 4, window) for _rank in range(world_size)]
        died_at = min(cursor + num_steps_lived, num_steps)
        for step in range(cursor, died_at):
            parts = [rank_slice(order.batch_ids(step), rank, world_size) for rank, order in enumerate(ranks)]
            seen[step] = np.concatenate(parts).tolist()
        cursor = max(cursor, died_at - num_lost)
    for epoch in range(3):
        expected = epoch_order(seed, epoch, sizes, window).tolist()
        shown = [row for step in range(num_steps // 3) for row in seen[epoch * num_steps // 3 + step]]
        assert shown == expected[: len(shown)]
        assert sum(sizes) - len(shown) < 4
    assert len(seen) == num_steps


def test_batches_of_one_epoch_do_not_overlap_and_epochs_differ():
    order = SampleOrder(7, [10, 13], 5)
    assert order.steps_per_epoch == 4
    epochs = [
        np.concatenate([order.batch_ids(epoch * 4 + i) for i in range(4)]).tolist() for epoch in range(2)
    ]
    assert len(set(epochs[0])) == 20
    assert epochs[0] != epochs[1]


def test_a_step_can_be_asked_for_in_any_order_and_from_a_fresh_object():
    order = SampleOrder(1, [8, 8], 4)
    forwards = [order.batch_ids(step).tolist() for step in range(12)]
    backwards = [order.batch_ids(step).tolist() for step in reversed(range(12))][::-1]
    fresh = [batch_ids(1, step, [8, 8], 4).tolist() for step in range(12)]
    assert forwards == backwards == fresh


def test_the_order_is_the_same_on_every_machine():
    assert epoch_order(0, 0, [3, 3], 2).tolist() == [5, 4, 0, 3, 1, 2]


def test_an_epoch_shorter_than_a_global_batch_is_an_error_with_the_numbers():
    with pytest.raises(DataError, match="an epoch has 10 clips, fewer than one global batch of 16"):
        steps_per_epoch(10, 16)


def test_a_batch_that_does_not_divide_over_the_ranks_is_an_error():
    with pytest.raises(DataError, match="global batch of 10 does not divide over 4 ranks"):
        rank_slice(np.arange(10), 0, 4)


VIDEOS = np.array([0, 1, 0, 0, 1, 0])
NARRATION_S = np.array([1.0, 2.0, 59.9, 60.0, 130.0, 30.0])


def test_companions_share_video_and_minute_and_are_not_the_anchor_unless_alone():
    index = build_scene_index(VIDEOS, NARRATION_S)
    ids = np.arange(6)
    drawn = {row: set() for row in range(6)}
    for step in range(200):
        for row, companion in zip(ids, scene_companions(index, ids, 5, step), strict=True):
            drawn[int(row)].add(int(companion))
    # Rows 0, 2 and 5 are one scene; 1 and 4 share a video but not a minute; 3 is alone at exactly 60.0 s.
    assert drawn == {0: {2, 5}, 1: {1}, 2: {0, 5}, 3: {3}, 4: {4}, 5: {0, 2}}


def test_companions_of_a_slice_are_those_of_the_whole_batch():
    index = build_scene_index(VIDEOS, NARRATION_S)
    ids = np.array([5, 0, 2, 3])
    whole = scene_companions(index, ids, 1, 9)
    halves = [scene_companions(index, half, 1, 9) for half in (ids[:2], ids[2:])]
    assert np.concatenate(halves).tolist() == whole.tolist()


def test_companions_are_drawn_evenly():
    index = build_scene_index(np.zeros(5, np.int64), np.zeros(5))
    counts = np.zeros(5)
    for step in range(2000):
        counts[scene_companions(index, np.array([2]), 0, step)[0]] += 1
    assert counts[2] == 0
    # 500 expected each, standard deviation 19.
    assert (np.abs(counts[[0, 1, 3, 4]] - 500) < 100).all()
