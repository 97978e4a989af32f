import os
from fractions import Fraction

import av
import numpy as np
import pytest
from video_files import CODEC_OPTIONS, read_barcode, write_video

from pipeline.decode import PyAvDecoder
from pipeline.errors import Reason
from pipeline.frame_match import DecodedFrame, FrameRequest
from pipeline.video import resolve_timeline


def numbers(videos_dir, requests, uid="v", layout="raw"):
    """Barcode of every answer, or its reason."""
    timeline = resolve_timeline(videos_dir, uid, layout)
    answers = dict(PyAvDecoder().decode_frames(timeline, [FrameRequest(t, end) for t, end in requests]))
    assert len(answers) == len(requests)
    return [
        read_barcode(answer.image) if isinstance(answer, DecodedFrame) else answer.reason
        for _position, answer in sorted(answers.items())
    ]


@pytest.mark.parametrize("codec", list(CODEC_OPTIONS))
def test_every_frame_of_every_codec_is_found_by_its_time(tmp_path, codec):
    write_video(tmp_path / "v.mp4", num_frames=75, codec=codec)
    assert numbers(tmp_path, [(i / 30, 9.0) for i in range(75)]) == list(range(75))


def test_av1_frames_are_those_of_a_plain_decode(tmp_path):
    path = write_video(tmp_path / "v.mp4", num_frames=40, codec="libsvtav1")
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "the tests that follow run as ever"
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    timeline = resolve_timeline(tmp_path, "v", "raw")
    for position, answer in PyAvDecoder().decode_frames(
        timeline, [FrameRequest(i / 30, 9) for i in range(40)]
    ):
        assert isinstance(answer, DecodedFrame)
        assert np.array_equal(answer.image, plain[position])


@pytest.mark.parametrize("fps", [25, Fraction(30000, 1001), Fraction(24000, 1001)])
def test_no_frame_rate_is_assumed(tmp_path, fps):
    write_video(tmp_path / "v.mp4", num_frames=100, fps=fps, codec="libx264-bframes")
    times = [(float(i / Fraction(fps)), 9.0) for i in (0, 1, 49, 50, 98, 99)]
    assert numbers(tmp_path, times) == [0, 1, 49, 50, 98, 99]


def test_the_nearest_frame_wins_and_a_tie_goes_to_the_earlier_one(tmp_path):
    write_video(tmp_path / "v.mp4", num_frames=20, fps=10)
    # Frames at 0.0, 0.1, 0.2 ...: 0.149 -> 0.1, 0.151 -> 0.2, 0.25 is a tie.
    assert numbers(tmp_path, [(0.149, 9.0), (0.151, 9.0), (0.25, 9.0)]) == [1, 2, 2]


def test_a_frame_at_or_past_the_end_of_the_clip_is_not_taken(tmp_path):
    write_video(tmp_path / "v.mp4", num_frames=20, fps=10)
    # 0.19 is nearer to 0.2, but a clip that ends at 0.2 does not hold that frame; one that ends at 0.21 does.
    assert numbers(tmp_path, [(0.19, 0.2), (0.19, 0.21)]) == [1, 2]


def test_requests_may_come_in_any_order_and_repeat(tmp_path):
    write_video(tmp_path / "v.mp4", num_frames=60)
    assert numbers(tmp_path, [(1.5, 9.0), (0.0, 9.0), (1.5, 9.0), (0.5, 9.0)]) == [45, 0, 45, 15]


@pytest.mark.parametrize("codec", list(CODEC_OPTIONS))
def test_long_gaps_are_skipped_without_losing_exactness(tmp_path, codec):
    write_video(tmp_path / "v.mp4", num_frames=400, codec=codec)
    wanted = [3, 100, 101, 250, 299, 300, 301, 399]
    assert numbers(tmp_path, [(i / 30, 20.0) for i in wanted]) == wanted


def test_matroska_without_a_finished_index_is_decoded(tmp_path):
    write_video(tmp_path / "v.mp4", num_frames=90, codec="libvpx-vp9", file_format="webm")
    assert numbers(tmp_path, [(i / 30, 9.0) for i in (0, 44, 89)]) == [0, 44, 89]


def test_variable_frame_rate_is_followed_by_timestamps(tmp_path):
    times = [Fraction(n, 100) for n in (0, 4, 8, 50, 54, 120, 121, 200)]
    write_video(tmp_path / "v.mp4", num_frames=8, times=times)
    # 0.28 lies 0.20 after frame 2 and 0.22 before frame 3; 0.30 is nearer to frame 3; 0.9 to frame 5.
    wanted = [(0.28, 9.0), (0.30, 9.0), (0.86, 9.0), (0.9, 9.0), (1.204, 9.0), (1.206, 9.0)]
    assert numbers(tmp_path, wanted) == [2, 3, 4, 5, 5, 6]


def test_a_lying_recording_is_stood_upright(tmp_path):
    path = write_video(tmp_path / "v.mp4", num_frames=3, rotation=-90, first_number=5)
    # -90 writes the display matrix of a phone held upright: 0 1 / -1 0, a clockwise turn.
    matrix = b"\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\xff\xff\x00\x00"
    assert matrix in path.read_bytes()
    timeline = resolve_timeline(tmp_path, "v", "raw")
    ((_position, answer),) = PyAvDecoder().decode_frames(timeline, [FrameRequest(0.0, 1.0)])
    assert isinstance(answer, DecodedFrame)
    assert answer.image.shape == (128, 96, 3)
    # The white top half of the stored picture comes to lie on the right.
    assert answer.image[:, 56:].min() > 200
    # Bits 0 and 2 of the barcode, on the left of it, come to lie at the top.
    assert answer.image[2:6, 8:40].min() > 200
    assert answer.image[18:22, 8:40].min() > 200
    assert answer.image[30:120, 8:40].max() < 60


def test_half_a_frame_past_the_end_is_the_last_frame_and_more_is_outside(tmp_path):
    write_video(tmp_path / "v.mp4", num_frames=30, fps=10)
    # The last frame is shown from 2.9 to 3.0 s.
    got = numbers(tmp_path, [(2.99, 9.0), (3.04, 9.0), (3.06, 9.0), (7.0, 9.0)])
    assert got == [29, 29, Reason.OUTSIDE_VIDEO, Reason.OUTSIDE_VIDEO]


def write_chunks(videos_dir, num_chunks=3, frames_per_chunk=450):
    """AVION chunks of 15 s at 30 fps, numbered on from file to file."""
    for k in range(num_chunks):
        path = videos_dir / "v.mp4" / f"{15 * k}.mp4"
        write_video(path, num_frames=frames_per_chunk, first_number=450 * k, codec="libx264-bframes")


def test_chunks_form_one_timeline_exact_to_the_frame_at_the_border(tmp_path):
    write_chunks(tmp_path)
    wanted = [0, 448, 449, 450, 451, 899, 900, 1349]
    assert numbers(tmp_path, [(i / 30, 60.0) for i in wanted], layout="avion_15s") == wanted
    # Just before the border the first frame of the next file is nearer.
    assert numbers(tmp_path, [(14.999, 60.0)], layout="avion_15s") == [450]


def test_a_clip_that_ends_at_the_border_does_not_open_the_next_file(tmp_path):
    write_chunks(tmp_path, num_chunks=1)
    (tmp_path / "v.mp4" / "15.mp4").write_text("not a video")
    assert numbers(tmp_path, [(14.5, 15.0), (14.999, 15.0)], layout="avion_15s") == [435, 449]
    # A clip that reaches into the broken file says so, and only for the frames in it.
    got = numbers(tmp_path, [(14.5, 16.0), (15.5, 16.0)], layout="avion_15s")
    assert got == [435, Reason.NOT_A_VIDEO]


def test_a_chunk_one_frame_short_costs_no_clip(tmp_path):
    write_chunks(tmp_path, num_chunks=2, frames_per_chunk=449)
    # Frame 449 does not exist; its neighbours 448 (at 14.933) and 450 (at 15.0) are as near as it gets.
    got = numbers(tmp_path, [(448 / 30, 60.0), (449 / 30, 60.0), (450 / 30, 60.0)], layout="avion_15s")
    assert got == [448, 448, 450]


def test_a_hole_between_chunks_is_a_gap_and_an_absent_chunk_is_missing(tmp_path):
    write_chunks(tmp_path, num_chunks=3, frames_per_chunk=300)
    (tmp_path / "v.mp4" / "15.mp4").unlink()
    got = numbers(tmp_path, [(9.9, 60), (12.0, 60), (20.0, 60), (30.0, 60), (99.0, 100)], layout="avion_15s")
    assert got == [297, Reason.GAP_IN_VIDEO, Reason.MISSING_CHUNK, 900, Reason.OUTSIDE_VIDEO]


def move_index_to_front(path):
    """What ffmpeg calls faststart, so that a cut file still opens."""
    out = path.with_name("fast.mp4")
    with av.open(str(path)) as source, av.open(str(out), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return out


def test_a_file_cut_in_the_middle_loses_only_what_is_cut(tmp_path):
    write_video(tmp_path / "whole.mp4", num_frames=150)
    content = move_index_to_front(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(content[: len(content) * 2 // 3])
    got = numbers(tmp_path, [(0.0, 9.0), (1.0, 9.0), (4.9, 9.0)])
    assert got[:2] == [0, 30]
    assert got[2] in (Reason.TRUNCATED_VIDEO, Reason.DECODE_ERROR)


@pytest.mark.parametrize("codec", ["libx264", "libx264-bframes", "libx265"])
def test_damage_costs_the_frames_up_to_the_next_keyframe_and_nothing_is_painted_over(tmp_path, codec):
    path = write_video(tmp_path / "v.mp4", num_frames=120, codec=codec)
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    keyframes = sorted(p.pts for p in packets if p.is_keyframe)
    victim = max((p for p in packets if keyframes[2] <= p.pts < keyframes[3]), key=lambda p: p.size)
    content = bytearray(path.read_bytes())
    content[victim.pos : victim.pos + victim.size] = bytes(victim.size)
    path.write_bytes(content)
    got = numbers(tmp_path, [(i / 30, 9.0) for i in range(120)])
    lost = [i for i, answer in enumerate(got) if answer == Reason.DECODE_ERROR]
    assert lost
    assert [answer for answer in got if answer != Reason.DECODE_ERROR] == [
        i for i in range(120) if i not in lost
    ]
    first_key = round(keyframes[1] / 512)
    last_key = round(keyframes[4] / 512)
    assert first_key <= lost[0]
    assert lost[-1] < last_key


def packets_of(path):
    """(byte position, number on a clock of 30 fps) of every frame, in order of decoding."""
    with av.open(str(path)) as container:
        time_base = container.streams.video[0].time_base
        return [(p.pos, round(p.pts * time_base * 30)) for p in container.demux(video=0) if p.size]


def test_a_file_cut_between_two_frames_has_no_neighbour_for_the_first_missing_one(tmp_path):
    write_video(tmp_path / "whole.mp4", num_frames=150)
    fast = move_index_to_front(tmp_path / "whole.mp4")
    cut_at, number = packets_of(fast)[100]
    assert number == 100
    (tmp_path / "v.mp4").write_bytes(fast.read_bytes()[:cut_at])
    assert numbers(tmp_path, [(i / 30, 9.0) for i in range(150)]) == [
        *range(100),
        *[Reason.TRUNCATED_VIDEO] * 50,
    ]


@pytest.mark.parametrize("place", range(1, 15))
def test_a_frame_that_the_decoder_swallows_is_reported_and_not_answered_by_its_neighbour(tmp_path, place):
    path = write_video(tmp_path / "v.mp4", num_frames=45, codec="libx264-bframes")
    content = bytearray(path.read_bytes())
    at, _number = packets_of(path)[place]
    timeline = resolve_timeline(tmp_path, "v", "raw")
    requests = [FrameRequest(i / 30, 9.0) for i in range(45)]
    num_lost = 0
    # The third byte behind the length counts pictures: with another count one of them is dropped, not an error.
    for bit in range(5):
        damaged = content.copy()
        damaged[at + 6] ^= 1 << bit
        path.write_bytes(damaged)
        for position, answer in PyAvDecoder().decode_frames(timeline, requests):
            if isinstance(answer, DecodedFrame):
                assert answer.time_s == pytest.approx(position / 30)
            else:
                num_lost += 1
                assert answer.reason == Reason.DECODE_ERROR
    assert num_lost > 0


def test_a_file_whose_first_keyframe_is_unreadable_begins_with_the_next_one(tmp_path):
    path = write_video(tmp_path / "v.mp4", num_frames=60)
    content = bytearray(path.read_bytes())
    # The length of the first unit is wrong, so the keyframe behind it is not seen to be one.
    content[packets_of(path)[0][0] + 3] ^= 16
    path.write_bytes(content)
    assert numbers(tmp_path, [(i / 30, 9.0) for i in range(60)]) == [
        *[Reason.DECODE_ERROR] * 15,
        *range(15, 60),
    ]
