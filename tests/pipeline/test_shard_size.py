import tarfile

import pytest
from video_files import write_video

from pipeline.clip import make_record
from pipeline.clip_table import ClipTable
from pipeline.config import PrepareConfig
from pipeline.crash_log import CrashLog
from pipeline.errors import DataError, Reason
from pipeline.frame_match import FrameFailure
from pipeline.prepare import build_shard, find_video, plan_shards, shard_settings
from pipeline.shard_size import (
    ShardSize,
    read_shard_size,
    sample_rows,
    size_of,
    stored_bytes,
    write_shard_size,
)

CONFIG = PrepareConfig(num_frames=3, short_side=48, shard_mib=1.0)
FAILURE = FrameFailure(Reason.DECODE_ERROR, "v.mp4 is damaged")


def clip(uid, start_s):
    return make_record(uid, start_s, start_s + 1, start_s, "#C C moves a cup", (1,), (0,))


def test_the_sample_is_spread_evenly_over_the_clips_of_usable_videos():
    # Rows 0-2 are of a, 3-12 of b, 13-14 of c.
    table = ClipTable.of(
        [clip(uid, k) for uid, count in (("a", 3), ("b", 10), ("c", 2)) for k in range(count)]
    )
    # Parts of 7.5 clips have their middles at 3.75 and 11.25.
    assert sample_rows(table, {"a", "b", "c"}, 2) == [3, 11]
    # Of the five rows 0, 1, 2, 13, 14 the middles are at 1.25 and 3.75.
    assert sample_rows(table, {"a", "c"}, 2) == [1, 13]
    assert sample_rows(table, {"c"}, 16) == [13, 14]
    assert sample_rows(table, set(), 16) == []


def test_bytes_of_a_clip_are_those_of_its_members_in_a_shard(tmp_path):
    write_video(tmp_path / "v.mp4", num_frames=60)
    timelines = dict([find_video("v", str(tmp_path), "raw")])
    one = clip("v", 0.5)
    (plan,) = plan_shards([one], timelines, CONFIG, 1)
    build_shard(plan, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as tar:
        sizes = [member.size for member in tar]
    assert len(sizes) == 4
    # A header of 512 bytes for each member, and its content filled up to blocks of 512.
    expected = sum(512 + -(-size // 512) * 512 for size in sizes)
    assert stored_bytes(one, timelines["v"], CONFIG) == expected


def test_a_clip_that_cannot_be_stored_has_a_reason_instead_of_a_size(tmp_path):
    _, absent = find_video("v", str(tmp_path), "raw")
    found = stored_bytes(clip("v", 0), absent, CONFIG)
    assert isinstance(found, FrameFailure)
    assert found.reason == Reason.MISSING_VIDEO
    write_video(tmp_path / "v.mp4", num_frames=60)
    (tmp_path / ".sample-0.run.decoding").write_text("v v")
    _, timeline = find_video("v", str(tmp_path), "raw")
    found = stored_bytes(clip("v", 0), timeline, CONFIG, CrashLog(tmp_path, "sample-0", "run"))
    assert isinstance(found, FrameFailure)
    assert found.reason == Reason.CRASHED_DECODER


def test_the_number_is_what_fits_into_the_size_aimed_at():
    # 2**20 / 2000 = 524.288
    size = size_of([1000, FAILURE, 3000], CONFIG)
    assert (size.mean_clip_bytes, size.num_measured, size.clips_per_shard) == (2000.0, 2, 524)
    # 2**20 / 4 / 2**16 = 4 to the byte.
    assert size_of([2**16], CONFIG.model_copy(update={"shard_mib": 0.25})).clips_per_shard == 4
    assert size_of([2**21], CONFIG).clips_per_shard == 1


def test_a_sample_without_a_clip_that_can_be_decoded_is_refused_with_the_reasons():
    with pytest.raises(
        DataError, match=r"2 clips .*1 MiB: none can be decoded \(decode_error 2\), such as: v\.mp4"
    ):
        size_of([FAILURE, FAILURE], CONFIG)


def test_a_pinned_number_is_found_for_the_same_settings_only(tmp_path):
    assert read_shard_size(tmp_path, CONFIG) is None
    size = size_of([1000], CONFIG)
    write_shard_size(tmp_path, size)
    assert read_shard_size(tmp_path, CONFIG) == size
    # What does not change the bytes of a shard changes nothing here.
    assert read_shard_size(tmp_path, CONFIG.model_copy(update={"max_rejected_share": 0.5})) == size
    for change in ({"shard_mib": 2.0}, {"num_frames": 4}, {"short_side": 47}, {"jpeg_quality": 91}):
        assert read_shard_size(tmp_path, CONFIG.model_copy(update=change)) is None
    (tmp_path / "shard-size.json").write_text("{")
    assert read_shard_size(tmp_path, CONFIG) is None


def test_settings_that_decide_content_keys_hold_a_given_number_and_no_measured_one():
    plain = {
        "format": 2,
        "num_frames": 3,
        "short_side": 48,
        "jpeg_quality": 90,
        "layout": "raw",
        "decoder": "pyav",
    }
    assert shard_settings(CONFIG) == plain
    given = CONFIG.model_copy(update={"clips_per_shard": 128, "shard_mib": 7.0})
    assert shard_settings(given) == {**plain, "clips_per_shard": 128}
    assert size_of([1000], CONFIG) == ShardSize(
        clips_per_shard=1048, shard_mib=1.0, mean_clip_bytes=1000.0, num_measured=1, settings=plain
    )
