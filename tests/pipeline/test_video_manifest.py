import multiprocessing
from fractions import Fraction

import av
import crashing_decoder
import pyarrow.parquet as pq
import pytest
from video_files import write_video

from pipeline import video_manifest
from pipeline.config import VideoLayout
from pipeline.crash_log import CrashLog
from pipeline.errors import DataError, Reason
from pipeline.mp4_header import read_mp4_header
from pipeline.prepare import find_video
from pipeline.video import file_identity, open_video
from pipeline.video_manifest import (
    VIDEOS_SCHEMA,
    VideoFileFacts,
    is_rate_varying,
    probe_files,
    read_videos,
    write_videos,
)


def probe(folder, uid="v", layout="raw", known=(), crash_log=None):
    return probe_files(find_video(uid, str(folder), layout)[1], folder, known, crash_log)


def remuxed(source, path, movflags):
    with av.open(str(source)) as reading, av.open(str(path), "w", options={"movflags": movflags}) as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for packet in reading.demux(video=0):
            if packet.size:
                packet.stream = stream
                writing.mux(packet)
    return path


@pytest.mark.parametrize("codec", ["libx264", "libx264-bframes"])
def test_facts_of_a_plain_video_are_those_it_was_written_with(tmp_path, codec):
    path = write_video(tmp_path / "v.mp4", num_frames=50, fps=25, codec=codec)
    assert probe(tmp_path) == (
        VideoFileFacts(
            video_uid="v",
            path="v.mp4",
            start_s=0.0,
            duration_s=2.0,
            codec="h264",
            fps=25.0,
            is_rate_varying=False,
            num_frames=50,
            width=128,
            height=96,
            rotation=0,
            is_cut_short=False,
            size_bytes=path.stat().st_size,
            digest=file_identity(path),
        ),
    )


def test_a_rate_that_varies_is_told_with_its_mean(tmp_path):
    # 20 frames in pairs 1/30 s and 1/20 s apart: 12 pairs a second. The last frame is shown as long as the one before.
    times = [Fraction(number // 2, 12) + Fraction(number % 2, 30) for number in range(20)]
    write_video(tmp_path / "v.mp4", num_frames=20, times=times)
    (facts,) = probe(tmp_path)
    assert (facts.is_rate_varying, facts.num_frames) == (True, 20)
    # 20 frames in 9 pairs of 1/12 s and two last frames of 1/30 s.
    assert facts.duration_s == pytest.approx(9 / 12 + 2 / 30, abs=1e-3)
    assert facts.fps == pytest.approx(20 / facts.duration_s, abs=1e-3)


@pytest.mark.parametrize(
    ("timestamps", "expected"),
    [
        # 30 fps in milliseconds is 33, 33, 34; 240 fps in milliseconds is 4, 4, 4, 5.
        ([0, 33, 67, 100, 133], False),
        ([0, 4, 8, 13, 17], False),
        ([0, 3000, 6000, 9300, 12300], False),
        ([0, 3000, 6000, 9301, 12301], True),
        ([0, 1001, 2002, 4004], True),
        ([0], False),
        ([], False),
    ],
)
def test_a_tenth_of_an_interval_and_rounding_to_a_tick_are_no_variation(timestamps, expected):
    assert is_rate_varying(timestamps) is expected


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_read_without_decoding_and_is_the_one_decoded_frames_carry(tmp_path, rotation):
    path = write_video(tmp_path / "v.mp4", num_frames=2, rotation=rotation)
    (facts,) = probe(tmp_path)
    with av.open(str(path)) as container:
        decoded = next(container.decode(video=0)).rotation
    assert (facts.rotation, decoded % 360) == (rotation, rotation)
    assert (facts.width, facts.height) == (128, 96)


def test_a_container_that_does_not_list_every_frame_gives_no_number_of_them(tmp_path):
    plain = write_video(tmp_path / "plain.mp4", num_frames=60)
    remuxed(plain, tmp_path / "v.mp4", "frag_keyframe+empty_moov+default_base_moof")
    (fragmented,) = probe(tmp_path)
    assert (fragmented.num_frames, fragmented.is_rate_varying, fragmented.rotation) == (None, None, 0)
    assert (fragmented.codec, fragmented.fps) == ("h264", 30.0)
    write_video(tmp_path / "w.webm", num_frames=60, codec="libvpx-vp9")
    (webm,) = probe(tmp_path, "w", VideoLayout(pattern="{uid}.webm"))
    assert (webm.num_frames, webm.is_rate_varying, webm.rotation) == (None, None, None)
    assert (webm.codec, webm.fps, webm.duration_s) == ("vp9", 30.0, 2.0)


def test_chunks_have_a_row_each_in_order_of_time(tmp_path):
    for start_s, num_frames in ((15, 45), (0, 450)):
        write_video(tmp_path / "v.mp4" / f"{start_s}.mp4", num_frames=num_frames)
    files = probe(tmp_path, layout="avion_15s")
    assert [(facts.path, facts.start_s, facts.num_frames, facts.duration_s) for facts in files] == [
        ("v.mp4/0.mp4", 0.0, 450, 15.0),
        ("v.mp4/15.mp4", 15.0, 45, 1.5),
    ]


def test_a_video_without_a_file_has_a_row_with_the_reason(tmp_path):
    (facts,) = probe(tmp_path)
    assert facts == VideoFileFacts(
        "v", reason=Reason.MISSING_VIDEO, detail=f"no file {tmp_path / 'v.mp4'}; layout is raw"
    )


def test_a_damaged_file_has_its_size_and_the_reason_and_one_cut_short_says_so(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", num_frames=60)
    content = whole.read_bytes()
    (tmp_path / "v.mp4").write_bytes(content[:-600])
    (facts,) = probe(tmp_path)
    assert (facts.reason, facts.path, facts.size_bytes) == (
        Reason.TRUNCATED_VIDEO,
        "v.mp4",
        len(content) - 600,
    )
    assert "its index cannot be read" in facts.detail
    assert (facts.codec, facts.num_frames, facts.is_cut_short) == (None, None, None)
    early = remuxed(whole, tmp_path / "early.mp4", "faststart")
    (tmp_path / "v.mp4").write_bytes(early.read_bytes()[:-600])
    (facts,) = probe(tmp_path)
    assert (facts.reason, facts.is_cut_short, facts.num_frames) == (None, True, 60)


class CountingOpener:
    """Opens videos and keeps their names."""

    def __init__(self):
        self.opened = []

    def __call__(self, path, video_uid, block_bytes=None):
        self.opened.append(path.name)
        return open_video(path, video_uid, block_bytes)


def test_files_that_are_known_and_unchanged_are_not_opened_again(tmp_path, monkeypatch):
    for number in range(3):
        write_video(tmp_path / "videos" / "v" / f"{number}.mp4", num_frames=5 + number)
    (tmp_path / "videos" / "v" / "3.mp4").write_bytes(b"no video")
    first = probe(tmp_path / "videos", layout="egovlp_600s")
    write_videos(tmp_path, first)
    opener = CountingOpener()
    monkeypatch.setattr(video_manifest, "open_video", opener)
    write_video(tmp_path / "videos" / "v" / "1.mp4", num_frames=9)
    second = probe(tmp_path / "videos", layout="egovlp_600s", known=read_videos(tmp_path))
    # The changed one and the one that no facts are known of.
    assert opener.opened == ["1.mp4", "3.mp4"]
    assert (second[0], second[2], second[3]) == (first[0], first[2], first[3])
    assert [facts.num_frames for facts in second] == [5, 9, 7, None]
    # The same files, called by another layout: nothing is opened, the time is the layout's.
    layout = VideoLayout(pattern="{uid}/{number}.mp4", chunk_s=10.0)
    third = probe(tmp_path / "videos", layout=layout, known=second[:3])
    assert opener.opened == ["1.mp4", "3.mp4", "3.mp4"]
    assert [facts.start_s for facts in third] == [0.0, 10.0, 20.0, 30.0]


def test_the_table_gives_back_what_was_written(tmp_path):
    write_video(tmp_path / "v.mp4", num_frames=3)
    (tmp_path / "w.mp4").write_bytes(b"no video")
    files = [facts for uid in "vwx" for facts in probe(tmp_path, uid)]
    write_videos(tmp_path, files)
    assert read_videos(tmp_path) == files
    assert [facts.reason for facts in files] == [None, Reason.NOT_A_VIDEO, Reason.MISSING_VIDEO]
    before = (tmp_path / "videos.parquet").read_bytes()
    write_videos(tmp_path, read_videos(tmp_path))
    assert (tmp_path / "videos.parquet").read_bytes() == before


def test_a_table_that_is_absent_damaged_or_of_another_version_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"videos\.parquet.*run it"):
        read_videos(tmp_path)
    write_videos(tmp_path, [VideoFileFacts("v")])
    table = pq.read_table(tmp_path / "videos.parquet")
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "videos.parquet")
    with pytest.raises(DataError, match="format none, expected 1"):
        read_videos(tmp_path)
    pq.write_table(table.drop(["fps"]), tmp_path / "videos.parquet")
    with pytest.raises(DataError, match="run prepare again"):
        read_videos(tmp_path)
    (tmp_path / "videos.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"read .*videos\.parquet"):
        read_videos(tmp_path)


def test_the_columns_are_the_facts():
    assert tuple(VIDEOS_SCHEMA.names) == tuple(VideoFileFacts.__dataclass_fields__)


def test_a_header_that_is_cut_anywhere_is_no_error(tmp_path):
    early = remuxed(write_video(tmp_path / "a.mp4", num_frames=3), tmp_path / "b.mp4", "faststart")
    for size in range(0, 1000, 7):
        (tmp_path / "c.mp4").write_bytes(early.read_bytes()[:size])
        with (tmp_path / "c.mp4").open("rb") as file:
            header = read_mp4_header(file, size)
        assert header is None or header.rotations in ({}, {1: 0})


def test_a_video_that_kills_the_process_that_opens_it_is_given_up_after_two_deaths(tmp_path):
    write_video(tmp_path / "b.mp4", num_frames=3)

    def attempt(run_key):
        process = multiprocessing.get_context("spawn").Process(
            target=crashing_decoder.probe, args=(tmp_path, "b", run_key)
        )
        process.start()
        process.join()
        return process.exitcode

    # A death in another run counts for nothing.
    assert [attempt("first run"), attempt("run"), attempt("run")] == [9, 9, 9]
    (facts,) = probe(tmp_path, "b", crash_log=CrashLog(tmp_path, "b", "run"))
    assert (facts.reason, facts.path) == (Reason.CRASHED_DECODER, "b.mp4")
    assert "died 2 times" in facts.detail
    assert not (tmp_path / ".b.run.decoding").exists()
    # In another run it is opened again.
    (facts,) = probe(tmp_path, "b", known=[facts], crash_log=CrashLog(tmp_path, "b", "next run"))
    assert (facts.reason, facts.num_frames) == (None, 3)
