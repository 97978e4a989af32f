import os

import av
import numpy as np
import pytest
from video_files import write_video

from pipeline.errors import Reason, VideoError
from pipeline.video import file_identity, midpoint_times, open_video, probe, resolve_timeline


def put(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def starts(timeline):
    return [chunk.start_s for chunk in timeline.chunks]


def test_a_raw_video_is_one_file_named_by_its_uid(tmp_path):
    put(tmp_path / "abc.mp4")
    timeline = resolve_timeline(tmp_path, "abc", "raw")
    assert starts(timeline) == [0.0]
    assert timeline.position_at(12345.6) == 0


def test_egovlp_chunks_are_counted_and_600_s_long(tmp_path):
    for k in (0, 1, 10, 2):
        put(tmp_path / "abc" / f"{k}.mp4")
    timeline = resolve_timeline(tmp_path, "abc", "egovlp_600s")
    assert starts(timeline) == [0.0, 600.0, 1200.0, 6000.0]
    # Half-open: second 600.0 belongs to the second file, 599.999 to the first, 1800 to none.
    assert [timeline.position_at(t) for t in (0.0, 599.999, 600.0, 1799.9, 1800.0)] == [0, 0, 1, 2, None]


@pytest.mark.parametrize(("layout", "chunk_s"), [("lavila_300s", 300), ("avion_15s", 15)])
def test_lavila_and_avion_chunks_are_named_by_their_first_second(tmp_path, layout, chunk_s):
    for k in range(3):
        put(tmp_path / "abc.mp4" / f"{k * chunk_s}.mp4")
    assert starts(resolve_timeline(tmp_path, "abc", layout)) == [0.0, chunk_s, 2.0 * chunk_s]


def test_a_span_that_ends_at_a_border_does_not_touch_the_next_file(tmp_path):
    for start in (0, 15, 30):
        put(tmp_path / "abc.mp4" / f"{start}.mp4")
    timeline = resolve_timeline(tmp_path, "abc", "avion_15s")
    assert [c.start_s for c in timeline.chunks_for(14.0, 15.0)] == [0.0]
    assert [c.start_s for c in timeline.chunks_for(14.0, 15.1)] == [0.0, 15.0]
    assert [c.start_s for c in timeline.chunks_for(15.0, 16.0)] == [15.0]


def test_a_chunk_name_that_contradicts_the_layout_is_refused(tmp_path):
    put(tmp_path / "abc.mp4" / "7.mp4")
    with pytest.raises(VideoError, match="starts at second 7; layout avion_15s has multiples of 15"):
        resolve_timeline(tmp_path, "abc", "avion_15s")


def test_an_empty_last_chunk_holds_no_time(tmp_path):
    put(tmp_path / "abc" / "0.mp4")
    put(tmp_path / "abc" / "1.mp4", b"")
    assert starts(resolve_timeline(tmp_path, "abc", "egovlp_600s")) == [0.0]


@pytest.mark.parametrize(
    ("uid", "layout", "reason"),
    [
        ("absent", "raw", Reason.MISSING_VIDEO),
        ("absent", "lavila_300s", Reason.MISSING_VIDEO),
        ("hollow", "egovlp_600s", Reason.MISSING_VIDEO),
        ("empty", "raw", Reason.EMPTY_VIDEO),
        ("../secret", "raw", Reason.BAD_NAME),
        (".hidden", "raw", Reason.BAD_NAME),
        ("a/b", "raw", Reason.BAD_NAME),
    ],
)
def test_unusable_names_and_files_have_a_reason(tmp_path, uid, layout, reason):
    (tmp_path / "hollow").mkdir()
    put(tmp_path / "empty.mp4", b"")
    with pytest.raises(VideoError) as caught:
        resolve_timeline(tmp_path, uid, layout)
    assert caught.value.reason == reason


def test_the_header_tells_codec_size_duration_and_period(tmp_path):
    header = probe(write_video(tmp_path / "v.mp4", num_frames=45, fps=30), "v")
    assert (header.codec, header.height, header.width) == ("h264", 96, 128)
    assert header.duration_s == pytest.approx(1.5)
    assert header.frame_s == pytest.approx(1 / 30)


def test_files_that_are_no_video_are_told_apart(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("This is a text file with a wrong name.\n" * 50)
    whole = write_video(tmp_path / "whole.mp4").read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    for path, reason in ((text, Reason.NOT_A_VIDEO), (cut, Reason.TRUNCATED_VIDEO)):
        with pytest.raises(VideoError) as caught:
            open_video(path, "v")
        assert caught.value.reason == reason, caught.value


def test_a_file_without_pictures_has_no_video_stream(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError) as caught:
        open_video(path, "v")
    assert caught.value.reason == Reason.NO_VIDEO_STREAM


def test_a_playlist_that_names_other_files_is_refused(tmp_path):
    write_video(tmp_path / "inner.mp4", num_frames=3)
    playlist = tmp_path / "v.mp4"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'inner.mp4'}\n#EXT-X-ENDLIST\n")
    with pytest.raises(VideoError) as caught:
        open_video(playlist, "v")
    assert caught.value.reason == Reason.NOT_A_VIDEO


def test_frames_above_the_pixel_cap_are_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", num_frames=2)
    monkeypatch.setattr("pipeline.video.MAX_PIXELS", 128 * 96 - 1)
    with pytest.raises(VideoError) as caught:
        open_video(path, "v")
    assert caught.value.reason == Reason.OVER_LIMIT


def test_identity_follows_content_at_both_ends_and_not_the_clock(tmp_path):
    path = tmp_path / "v.bin"
    path.write_bytes(bytes(300_000))
    before = file_identity(path)
    os.utime(path, (1, 1))
    assert file_identity(path) == before
    path.write_bytes(bytes(299_999) + b"x")
    assert file_identity(path) != before


def test_midpoints_of_four_segments_of_two_seconds():
    assert midpoint_times(10.0, 12.0, 4) == [10.25, 10.75, 11.25, 11.75]
