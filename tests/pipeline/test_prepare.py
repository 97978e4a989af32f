import gc
import io
import json
import multiprocessing
import subprocess

import crashing_decoder
import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from video_files import read_barcode, write_video

from pipeline.clip import make_record
from pipeline.config import PrepareConfig
from pipeline.errors import DataError, Reason
from pipeline.manifest import (
    build_manifest,
    read_manifest,
    verify_set,
    write_index,
    write_manifest,
    write_rejected,
)
from pipeline.prepare import build_decoder, build_shard, find_video, plan_shards, shard_settings
from pipeline.shards import read_receipt

CONFIG = PrepareConfig(num_frames=4, short_side=48, jpeg_quality=95, clips_per_shard=2)


def clip(uid, start_s, end_s, caption="#C C moves a cup"):
    return make_record(uid, start_s, end_s, (start_s + end_s) / 2, caption, (1,), (0, 2))


def plan(records, videos_dir, config=CONFIG):
    timelines = dict(
        find_video(uid, str(videos_dir), config.layout) for uid in {r.video_uid for r in records}
    )
    return plan_shards(records, timelines, config, config.clips_per_shard)


def frames_of(out_dir, receipt):
    content = (out_dir / f"{receipt.name}.tar").read_bytes()
    return {
        stored.clip_id: [
            read_barcode(np.asarray(Image.open(io.BytesIO(content[offset : offset + size]))))
            for offset, size in zip(stored.frame_offsets, stored.frame_sizes, strict=True)
        ]
        for stored in receipt.clips
    }


@pytest.fixture
def videos_dir(tmp_path):
    folder = tmp_path / "videos"
    for uid in ("a", "b"):
        write_video(folder / f"{uid}.mp4", num_frames=90)
    return folder


def test_stored_frames_are_those_at_the_midpoints_of_equal_segments(tmp_path, videos_dir):
    records = [clip("a", 0.5, 1.5), clip("a", 1.0, 1.8)]
    (receipt,) = (build_shard(p, tmp_path / "out") for p in plan(records, videos_dir))
    # [0.5, 1.5) in four: 0.625, 0.875, 1.125, 1.375 s; at 30 fps 18.75, 26.25, 33.75, 41.25.
    # [1.0, 1.8) in four: 1.1, 1.3, 1.5, 1.7 s.
    assert list(frames_of(tmp_path / "out", receipt).values()) == [[19, 26, 34, 41], [33, 39, 45, 51]]
    assert (receipt.clips[0].height, receipt.clips[0].width) == (48, 64)


def test_clips_stand_by_video_and_time_in_shards_of_fixed_size(videos_dir):
    records = [clip("b", 1, 2), clip("a", 2, 3), clip("a", 0, 1), clip("b", 0, 1), clip("a", 1, 2)]
    plans = plan(records, videos_dir)
    assert [[(c.video_uid, c.start_s) for c in p.clips] for p in plans] == [
        [("a", 0), ("a", 1)],
        [("a", 2), ("b", 0)],
        [("b", 1)],
    ]
    assert [p.name for p in plans] == ["shard-00000", "shard-00001", "shard-00002"]


def test_a_clip_id_that_stands_twice_is_refused(videos_dir):
    with pytest.raises(DataError, match="stands twice"):
        plan([clip("a", 0, 1), clip("a", 0, 1)], videos_dir)


def test_the_content_key_follows_clips_settings_and_video_files(videos_dir):
    records = [clip("a", 0, 1)]
    key = plan(records, videos_dir)[0].content_key
    assert plan(records, videos_dir)[0].content_key == key
    assert (
        plan(records, videos_dir, CONFIG.model_copy(update={"max_rejected_share": 0.5}))[0].content_key == key
    )
    assert plan(records, videos_dir, CONFIG.model_copy(update={"jpeg_quality": 94}))[0].content_key != key
    assert plan([clip("a", 0, 1, "other")], videos_dir)[0].content_key != key
    write_video(videos_dir / "b.mp4", num_frames=30)
    assert plan(records, videos_dir)[0].content_key == key
    write_video(videos_dir / "a.mp4", num_frames=89)
    assert plan(records, videos_dir)[0].content_key != key


def test_a_rerun_keeps_finished_shards_and_rebuilds_damaged_ones_to_the_same_bytes(tmp_path, videos_dir):
    out_dir = tmp_path / "out"
    plans = plan([clip("a", 0, 1), clip("a", 1, 2), clip("b", 0, 1)], videos_dir)
    first = [build_shard(p, out_dir) for p in plans]
    paths = [out_dir / f"{p.name}.tar" for p in plans]
    bytes_before = [path.read_bytes() for path in paths]
    paths[1].write_bytes(bytes_before[1][:700])
    inode = paths[0].stat().st_ino
    assert [build_shard(p, out_dir) for p in plans] == first
    assert [path.read_bytes() for path in paths] == bytes_before
    assert paths[0].stat().st_ino == inode


def test_a_clip_shorter_than_the_frame_grid_repeats_frames_by_rule_and_counts_them(tmp_path, videos_dir):
    # Midpoints 1.00625, 1.01875, 1.03125, 1.04375 s; frame 30 is at 1.0, frame 31 at 1.0333 s.
    (receipt,) = (build_shard(p, tmp_path / "out") for p in plan([clip("a", 1.0, 1.05)], videos_dir))
    assert list(frames_of(tmp_path / "out", receipt).values()) == [[30, 31, 31, 31]]
    assert receipt.repeated_frames == 2
    assert receipt.clips[0].repeated_frames == 2


def bad_inputs(videos_dir):
    """video uid -> the reason expected for a clip of it."""
    whole = (videos_dir / "a.mp4").read_bytes()
    (videos_dir / "empty.mp4").write_bytes(b"")
    (videos_dir / "text.mp4").write_text("not a video at all\n" * 40)
    (videos_dir / "cut.mp4").write_bytes(whole[:-2000])
    return {
        "absent": Reason.MISSING_VIDEO,
        "empty": Reason.EMPTY_VIDEO,
        "text": Reason.NOT_A_VIDEO,
        "cut": Reason.TRUNCATED_VIDEO,
    }


def test_every_unusable_clip_is_rejected_with_its_reason_and_none_is_replaced(tmp_path, videos_dir):
    expected = bad_inputs(videos_dir)
    records = [clip(uid, 0.0, 1.0) for uid in expected]
    records += [
        clip("a", 2.0, 3.0),
        clip("a", 2.1, 3.01),
        clip("a", 2.2, 3.1),
        clip("a", 50.0, 51.0),
        clip("b", 0.0, 1.0, "#C C ..."),
    ]
    out_dir = tmp_path / "out"
    config = CONFIG.model_copy(update={"clips_per_shard": 100})
    (receipt,) = (build_shard(p, out_dir) for p in plan(records, videos_dir, config))
    reasons = {(r.video_uid, r.start_s): r.reason for r in receipt.rejected}
    assert reasons == {
        **{(uid, 0.0): reason for uid, reason in expected.items()},
        # The video ends at 3.0 s; up to half a frame (16.7 ms) more is tolerated.
        ("a", 2.2): Reason.OUTSIDE_VIDEO,
        ("a", 50.0): Reason.OUTSIDE_VIDEO,
        ("b", 0.0): Reason.EMPTY_CAPTION,
    }
    assert [(c.video_uid, c.start_s) for c in receipt.clips] == [("a", 2.0), ("a", 2.1)]
    assert all(rejected.detail for rejected in receipt.rejected)


def test_a_video_that_turns_up_later_changes_only_its_own_shard(tmp_path, videos_dir):
    out_dir = tmp_path / "out"
    records = [clip("a", 0, 1), clip("a", 1, 2), clip("c", 0, 1), clip("c", 1, 2)]
    first = [build_shard(p, out_dir) for p in plan(records, videos_dir)]
    assert [r.num_clips for r in first] == [2, 0]
    write_video(videos_dir / "c.mp4", num_frames=60)
    second = [build_shard(p, out_dir) for p in plan(records, videos_dir)]
    assert second[0] == first[0]
    assert second[1].num_clips == 2


def test_clips_over_chunk_borders_hold_the_same_frames_as_in_one_file(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write_video(whole / "v.mp4", num_frames=960)
    write_video(parts / "v.mp4" / "0.mp4", num_frames=450)
    write_video(parts / "v.mp4" / "15.mp4", num_frames=450, first_number=450)
    write_video(parts / "v.mp4" / "30.mp4", num_frames=60, first_number=900)
    records = [clip("v", 14.0, 15.0), clip("v", 14.4, 15.6), clip("v", 15.0, 15.5), clip("v", 29.0, 31.0)]
    config = CONFIG.model_copy(update={"clips_per_shard": 9})
    chunked = config.model_copy(update={"layout": "avion_15s"})
    (one,) = (build_shard(p, tmp_path / "one") for p in plan(records, whole, config))
    (many,) = (build_shard(p, tmp_path / "many") for p in plan(records, parts, chunked))
    assert frames_of(tmp_path / "many", many) == frames_of(tmp_path / "one", one)
    # 14.4 .. 15.6 in four: 14.55, 14.85, 15.15, 15.45 s lie midway between two frames; the earlier one wins.
    assert list(frames_of(tmp_path / "one", one).values())[1] == [436, 445, 454, 463]


@pytest.fixture
def published(tmp_path, videos_dir):
    out_dir = tmp_path / "out"
    records = [clip("a", i / 4, i / 4 + 0.5) for i in range(5)] + [clip("absent", 0, 1)]
    receipts = [build_shard(p, out_dir) for p in plan(records, videos_dir)]
    write_rejected(out_dir, receipts)
    manifest = build_manifest(
        "train", [receipt.summary for receipt in receipts], shard_settings(CONFIG), {}, None, (2, 3), {}
    )
    write_index(out_dir, receipts)
    write_manifest(out_dir, manifest, [receipt.name for receipt in receipts])
    return out_dir


# WebDataset 1.0 leaves the files it reads to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_plain_webdataset_and_tar_agree_with_the_manifest(published):
    manifest = read_manifest(published)
    assert (manifest.num_clips, manifest.num_planned, manifest.num_rejected) == (5, 6, 1)
    assert manifest.rejected_by_reason == {"missing_video": 1}
    names = [name.name for name in manifest.shards]
    assert names == ["shard-00000", "shard-00001", "shard-00002"]
    urls = [str(published / f"{name}.tar") for name in names]
    samples = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    gc.collect()
    assert len(samples) == manifest.num_clips
    for sample in samples:
        assert {"00.jpg", "01.jpg", "02.jpg", "03.jpg", "json"} <= set(sample)
        assert sample["00.jpg"].size == (64, 48)
        assert sample["json"]["verbs"] == [1]
    listed = subprocess.run(["tar", "tf", urls[0]], check=True, capture_output=True, text=True).stdout.split()
    assert len(listed) == manifest.shards[0].num_clips * (CONFIG.num_frames + 1)
    lines = (published / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["missing_video"]


def test_verification_names_every_file_that_differs(published):
    manifest = read_manifest(published)
    assert verify_set(published, manifest) == []
    content = bytearray((published / "shard-00001.tar").read_bytes())
    content[600] ^= 1
    (published / "shard-00001.tar").write_bytes(content)
    (published / "shard-00002.tar").unlink()
    assert verify_set(published, manifest, is_full=False) == ["shard-00002.tar: missing"]
    assert verify_set(published, manifest) == [
        "shard-00001.tar: its SHA-256 differs from the manifest",
        "shard-00002.tar: missing",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_a_gpu_decoder_without_a_gpu_says_what_to_set():
    with pytest.raises(DataError, match=r"set prepare\.decoder to pyav"):
        build_decoder("dali_gpu")


def test_a_video_that_kills_its_process_twice_is_rejected_and_the_others_are_kept(tmp_path, videos_dir):
    out_dir = tmp_path / "out"
    config = CONFIG.model_copy(update={"clips_per_shard": 9})
    (one,) = plan([clip("a", 0, 1), clip("b", 0, 1), clip("b", 1, 2)], videos_dir, config)

    def attempt(run_key):
        process = multiprocessing.get_context("spawn").Process(
            target=crashing_decoder.build, args=(one, out_dir, run_key)
        )
        process.start()
        process.join()
        return process.exitcode

    # A death in another run counts for nothing.
    assert [attempt("first run"), attempt("run"), attempt("run"), attempt("run")] == [9, 9, 9, 0]
    receipt = read_receipt(out_dir / f"{one.name}.json")
    assert [stored.video_uid for stored in receipt.clips] == ["a"]
    assert [rejected.reason for rejected in receipt.rejected] == [Reason.CRASHED_DECODER] * 2
    assert "died 2 times" in receipt.rejected[0].detail
