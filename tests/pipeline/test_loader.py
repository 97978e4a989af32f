import itertools
import threading

import numpy as np
import pytest
import torch
from stored_clips import NUM_FRAMES, image_of, write_set

from pipeline.config import LoaderConfig
from pipeline.errors import ClipError, DataError, Reason, ShardError
from pipeline.loader import BatchLoader, ClipView, FramePipeline, eval_batches, prefetch
from pipeline.store import ClipStore
from pipeline.text import CaptionTokenizer

CONFIG = LoaderConfig(image_size=32, text_length=8)


@pytest.fixture(scope="module")
def set_dir(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture
def store(set_dir):
    with_close = ClipStore(set_dir)
    yield with_close
    with_close.close()


@pytest.fixture
def tokenizer(set_dir):
    return CaptionTokenizer(set_dir / "vocab.txt", 8)


def clip_and_frames(video_TCHW):
    """(clip, frames) told by the colours."""
    red, green = (video_TCHW[:, channel].float().mean(dim=(1, 2)) for channel in (0, 1))
    return round(float(red.mean()) / 10), [round(float(value) / 20) for value in green]


def loader(store, tokenizer, **changes):
    settings = {"num_frames": 4, "seed": 3, "global_batch_size": 4, **changes}
    return BatchLoader(store, tokenizer, CONFIG, **settings)


def take(batch_loader, first, num):
    batches = batch_loader.batches_from(first)
    taken = [next(batches) for _ in range(num)]
    batches.close()
    return taken


def test_a_batch_holds_what_its_rows_say(store, tokenizer):
    ((step, batch),) = take(loader(store, tokenizer), 0, 1)
    assert step == 0
    assert batch.video_BTCHW.shape == (4, 4, 3, 32, 32)
    assert batch.video_BTCHW.dtype == torch.uint8
    assert batch.video_BTCHW.is_contiguous()
    for i, row in enumerate(batch.index_B.tolist()):
        clip, frames = clip_and_frames(batch.video_BTCHW[i])
        assert batch.clip_ids[i] == store.clip_id(row)
        assert clip == row
        # Eight stored frames in four segments: one of 0, 1, then one of 2, 3 ...
        assert [frame // 2 for frame in frames] == [0, 1, 2, 3]
        assert batch.verbs_BV[i].tolist() == [k == row % 3 for k in range(3)]
        assert batch.nouns_BU[i].tolist() == [k == row % 2 for k in range(2)]
    ids_BL, mask_BL = tokenizer([f"moves cup {row}" for row in batch.index_B.tolist()])
    assert torch.equal(batch.text_ids_BL, ids_BL)
    assert torch.equal(batch.text_mask_BL, mask_BL)


def test_one_window_holds_for_all_frames_of_a_clip(store, tokenizer):
    ((_step, batch),) = take(loader(store, tokenizer), 0, 1)
    blue_BTW = batch.video_BTCHW[:, :, 2].float().mean(dim=2)
    assert (blue_BTW - blue_BTW[:, :1]).abs().max() <= 3
    assert len({round(float(row[0, 0])) for row in blue_BTW}) > 1


def same(a, b):
    return (
        a.clip_ids == b.clip_ids
        and torch.equal(a.video_BTCHW, b.video_BTCHW)
        and torch.equal(a.text_ids_BL, b.text_ids_BL)
    )


def test_a_restart_at_any_step_continues_with_the_same_pixels(store, tokenizer):
    whole = take(loader(store, tokenizer), 0, 7)
    resumed = take(loader(store, tokenizer), 4, 3)
    for (step_a, a), (step_b, b) in zip(whole[4:], resumed, strict=True):
        assert step_a == step_b
        assert same(a, b)


def test_ranks_together_see_the_pixels_of_one_process(store, tokenizer):
    ((_step, whole),) = take(loader(store, tokenizer), 5, 1)
    parts = [take(loader(store, tokenizer, rank=rank, world_size=2), 5, 1)[0][1] for rank in range(2)]
    assert parts[0].clip_ids + parts[1].clip_ids == whole.clip_ids
    assert torch.equal(torch.cat([part.video_BTCHW for part in parts]), whole.video_BTCHW)


def take_global(store, tokenizer, step, world_size, num_threads, prefetch_batches):
    """(clip ids, pixels) of the global batch of one step: what all ranks show together, begun at that step."""
    config = CONFIG.model_copy(update={"num_threads": num_threads, "prefetch_batches": prefetch_batches})
    batches = []
    for rank in range(world_size):
        one = BatchLoader(store, tokenizer, config, 4, 3, 4, rank=rank, world_size=world_size)
        ((first_step, batch),) = take(one, step, 1)
        assert first_step == step
        batches.append(batch)
    return [i for b in batches for i in b.clip_ids], torch.cat([b.video_BTCHW for b in batches])


def test_three_epochs_are_the_same_after_fifty_restarts_on_any_world_size_and_number_of_threads(
    store, tokenizer
):
    # Three steps of four of the twelve clips are an epoch.
    whole = [batch for _step, batch in take(loader(store, tokenizer), 0, 9)]
    for epoch in range(3):
        assert len({i for batch in whole[3 * epoch : 3 * epoch + 3] for i in batch.clip_ids}) == 12
    settings = itertools.cycle(itertools.product([1, 2, 4], [1, 2], [1, 3]))
    for step in np.random.default_rng(0).integers(0, 9, 50):
        clip_ids, video_BTCHW = take_global(store, tokenizer, int(step), *next(settings))
        assert clip_ids == list(whole[step].clip_ids)
        assert torch.equal(video_BTCHW, whole[step].video_BTCHW)


def test_another_epoch_shows_the_same_clip_differently(store, tokenizer):
    batches = [batch for _step, batch in take(loader(store, tokenizer), 0, 6)]
    shown = {}
    for epoch in range(2):
        for batch in batches[3 * epoch : 3 * epoch + 3]:
            for i, clip_id in enumerate(batch.clip_ids):
                shown.setdefault(clip_id, []).append(batch.video_BTCHW[i])
    assert len(shown) == 12
    assert sum(torch.equal(first, second) for first, second in shown.values()) == 0


def test_companions_fill_the_second_half_and_share_the_scene(store, tokenizer):
    ((_step, batch),) = take(loader(store, tokenizer, with_companions=True), 0, 1)
    anchors, companions = batch.index_B[:4], batch.index_B[4:]
    ((_step, plain),) = take(loader(store, tokenizer), 0, 1)
    assert torch.equal(anchors, plain.index_B)
    assert torch.equal(anchors % 2, companions % 2)
    assert (anchors != companions).all()
    assert batch.video_BTCHW.shape[0] == 8


def test_asking_for_more_than_there_is_fails_at_once_with_the_numbers(store, tokenizer):
    with pytest.raises(DataError, match="an epoch has 12 clips, fewer than one global batch of 16"):
        loader(store, tokenizer, global_batch_size=16)
    with pytest.raises(DataError, match="9 frames wanted per clip, 8 are stored"):
        loader(store, tokenizer, num_frames=9)
    with pytest.raises(DataError, match="does not divide over 3 ranks"):
        loader(store, tokenizer, world_size=3)


def test_evaluation_shows_the_whole_frame_and_the_middles_in_the_order_asked(store, tokenizer):
    rows = store.rows_of([store.clip_id(row) for row in (7, 2, 11)])
    assert rows.tolist() == [7, 2, 11]
    for frame_order, expected in (("ordered", [1, 3, 5, 7]), ("reversed", [7, 5, 3, 1])):
        batches = list(eval_batches(store, rows, tokenizer, CONFIG, 4, 2, frame_order))
        assert [len(batch.clip_ids) for batch in batches] == [2, 1]
        video = torch.cat([batch.video_BTCHW for batch in batches])
        assert [clip_and_frames(clip) for clip in video] == [(7, expected), (2, expected), (11, expected)]
        # Blue runs over its full range: nothing is cropped away.
        assert video[:, :, 2, :, 0].max() < 12
        assert video[:, :, 2, :, -1].min() > 243
    shuffled = torch.cat(
        [b.video_BTCHW for b in eval_batches(store, rows, tokenizer, CONFIG, 4, 2, "shuffled")]
    )
    for clip in shuffled:
        _number, frames = clip_and_frames(clip)
        assert frames != [1, 3, 5, 7]
        assert sorted(frames) == [1, 3, 5, 7]


def test_a_shrunk_clip_looks_like_the_plain_picture(store):
    pipeline = FramePipeline(1, 1, 32)
    video = pipeline.decode(store, [ClipView(3, np.array([5]), (0, 0, 48, 64))])
    expected = image_of(3, 5, (32, 32)).astype(int)
    got = video[0, 0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - expected).max() <= 6


def damaged(tmp_path, offset_of_clip, change):
    set_dir = write_set(tmp_path / "damaged")
    store = ClipStore(set_dir)
    path = set_dir / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    change(content, int(store._offsets[offset_of_clip, 0]))
    path.write_bytes(content)
    return store


def test_a_flipped_bit_is_met_on_reading_and_names_clip_and_shard(tmp_path):
    def flip(content, offset):
        content[offset + 300] ^= 1

    store = damaged(tmp_path, 6, flip)
    tokenizer = CaptionTokenizer(store.shards_dir / "vocab.txt", 8)
    with pytest.raises(ClipError) as caught:
        list(eval_batches(store, range(12), tokenizer, CONFIG, NUM_FRAMES, 4))
    assert caught.value.clip_id == store.clip_id(6)
    assert caught.value.reason == Reason.DAMAGED_SHARD
    assert "shard-00001.tar" in str(caught.value)
    with pytest.raises(ShardError, match=r"shard-00001\.tar: its SHA-256 differs"):
        store.verify()
    store.close()


def test_a_stored_frame_that_is_no_jpeg_names_clip_and_frame(tmp_path):
    from pipeline import shards

    set_dir = write_set(tmp_path / "set")
    receipt = shards.read_receipt(set_dir / "shard-00000.json")
    good = ClipStore(set_dir)
    jpegs = [good.read_frame(0, j).tobytes() for j in range(NUM_FRAMES)]
    jpegs[2] = jpegs[2][: len(jpegs[2]) // 4]
    good.close()
    from pipeline.clip import make_record
    from pipeline.manifest import build_manifest, write_index, write_manifest

    with shards.ShardWriter(set_dir, "shard-00000") as writer:
        writer.add(make_record("v0", 0.0, 1.0, 0.5, "bad", (0,), (0,)), jpegs, [0.0] * NUM_FRAMES, 48, 64)
        receipt = writer.finish("key", [])
    manifest = build_manifest("train", [receipt.summary], {"num_frames": NUM_FRAMES}, {}, None, (3, 2), {})
    write_index(set_dir, [receipt])
    write_manifest(set_dir, manifest, [receipt.name])
    store = ClipStore(set_dir)
    view = ClipView(0, np.arange(NUM_FRAMES), (0, 0, 48, 64))
    with pytest.raises(ClipError, match=r"damaged_frame: frame 2 in shard-00000\.tar"):
        FramePipeline(1, NUM_FRAMES, 32).decode(store, [view])
    store.close()


def test_a_set_with_a_missing_or_shortened_shard_is_refused_on_opening(tmp_path):
    set_dir = write_set(tmp_path / "set")
    path = set_dir / "shard-00001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-512])
    with pytest.raises(ShardError, match=r"shard-00001\.tar: \d+ bytes, the manifest says"):
        ClipStore(set_dir)
    path.unlink()
    with pytest.raises(ShardError, match=r"shard-00001\.tar: missing"):
        ClipStore(set_dir)
    (set_dir / "manifest.json").unlink()
    with pytest.raises(ShardError, match="Run prepare, which goes on"):
        ClipStore(set_dir)


def test_prefetch_raises_the_error_of_its_thread_after_the_values_before_it():
    def produce():
        yield 1
        yield 2
        raise ValueError("broken")

    values = prefetch(produce, 4)
    assert [next(values), next(values)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(values)


def test_prefetch_stays_bounded_and_closing_it_ends_the_thread():
    made = []

    def produce():
        for i in range(1000):
            made.append(i)
            yield i

    values = prefetch(produce, 2)
    assert next(values) == 0
    values.close()
    assert not [t for t in threading.enumerate() if t.name == "batch-prefetch"]
    # One taken, two in the queue, one in hand, one under way at most.
    assert len(made) <= 5
