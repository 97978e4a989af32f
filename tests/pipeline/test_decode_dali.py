import io

import av
import numpy as np
import pytest
from video_files import CODEC_OPTIONS, read_barcode, write_video

from pipeline.decode import PyAvDecoder, upright_rgb
from pipeline.decode_dali import DaliGpuDecoder, DaliSegmentDecoder, PacketRow, Segment, plan_segments
from pipeline.errors import Reason
from pipeline.frame_match import DecodedFrame, FrameRequest
from pipeline.video import resolve_timeline

TIMES = [0.0, 0.01, 0.02, 2.5, 2.51, 3.1, 3.9, 4.96, 4.999, 5.01, 5.02, 6.0]
EXPECTED = [0, 0, 1, 75, 75, 93, 117, 149, 149, 149, Reason.OUTSIDE_VIDEO, Reason.OUTSIDE_VIDEO]


def decode_by_number(encoded, frame_numbers):
    """Stands in for DALI: frames of a stream in memory by their number in order of presentation."""
    with av.open(io.BytesIO(encoded)) as container:
        images = [upright_rgb(frame) for frame in container.decode(video=0)]
    return np.stack([images[number] for number in frame_numbers])


def answers(decoder, videos_dir, uid="v", layout="raw", times=TIMES):
    timeline = resolve_timeline(videos_dir, uid, layout)
    return [
        answer
        for _position, answer in sorted(
            decoder.decode_frames(timeline, [FrameRequest(time_s, 99.0) for time_s in times]),
            key=lambda item: item[0],
        )
    ]


def numbers(found):
    return [read_barcode(a.image) if isinstance(a, DecodedFrame) else a.reason for a in found]


@pytest.mark.parametrize("codec", list(CODEC_OPTIONS))
def test_frames_by_number_are_those_of_the_cpu_decoder(tmp_path, codec):
    write_video(tmp_path / "v.mp4", num_frames=150, codec=codec)
    assert numbers(answers(DaliGpuDecoder(decode_by_number), tmp_path)) == EXPECTED


def test_dali_itself_decodes_the_copied_segments_of_vp9(tmp_path):
    write_video(tmp_path / "v.mp4", num_frames=150, codec="libvpx-vp9")
    by_dali = answers(DaliGpuDecoder(DaliSegmentDecoder("cpu")), tmp_path)
    by_pyav = answers(PyAvDecoder(), tmp_path)
    assert numbers(by_dali) == EXPECTED
    for dali, pyav in zip(by_dali, by_pyav, strict=True):
        if isinstance(dali, DecodedFrame) and isinstance(pyav, DecodedFrame):
            assert dali.time_s == pyav.time_s
            # Two colour converters differ by rounding.
            assert np.abs(dali.image.astype(int) - pyav.image).max() <= 2


def test_chunks_and_rotation_are_handled_as_on_the_cpu(tmp_path):
    for k in range(2):
        path = tmp_path / "v.mp4" / f"{15 * k}.mp4"
        write_video(path, num_frames=450, first_number=450 * k, codec="libx264-bframes", rotation=-90)
    times = [0.0, 14.9, 14.97, 15.0, 29.9]
    by_dali = answers(DaliGpuDecoder(decode_by_number_lying), tmp_path, layout="avion_15s", times=times)
    by_pyav = answers(PyAvDecoder(), tmp_path, layout="avion_15s", times=times)
    for dali, pyav in zip(by_dali, by_pyav, strict=True):
        assert isinstance(dali, DecodedFrame)
        assert isinstance(pyav, DecodedFrame)
        assert dali.time_s == pyav.time_s
        assert np.array_equal(dali.image, pyav.image)


def decode_by_number_lying(encoded, frame_numbers):
    with av.open(io.BytesIO(encoded)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([images[number] for number in frame_numbers])


def test_a_segment_that_cannot_be_decoded_fails_its_own_frames_only(tmp_path):
    write_video(tmp_path / "v.mp4", num_frames=150)
    calls = []

    def fail_once(encoded, frame_numbers):
        calls.append(frame_numbers)
        if len(calls) == 1:
            raise RuntimeError("corrupt stream")
        return decode_by_number(encoded, frame_numbers)

    found = numbers(answers(DaliGpuDecoder(fail_once), tmp_path, times=[0.0, 0.1, 3.0]))
    assert found == [Reason.DECODE_ERROR, Reason.DECODE_ERROR, 90]


def test_segments_run_from_the_keyframe_to_the_last_wanted_frame_in_decoding_order():
    # Decoding order I0 P4 B2 b1 b3 | I8 (open group: B6 b5 b7 need I8 and P4) P12.
    order = [(0, True), (4, False), (2, False), (1, False), (3, False)]
    order += [(8, True), (6, False), (5, False), (7, False), (12, False)]
    packets = [PacketRow(pts, is_key) for pts, is_key in order]
    assert plan_segments(packets, [3, 1, 12]) == [
        Segment(first=0, last=4, floor_pts=0, frame_numbers={1: 1, 3: 3}),
        # 5, 6 and 7 are left out, so 8 is frame 0 and 12 frame 1.
        Segment(first=5, last=9, floor_pts=8, frame_numbers={12: 1}),
    ]
    # 6 is shown before keyframe 8: its group starts at 0 and runs past 8; 5 and 7 come later.
    assert plan_segments(packets, [6]) == [Segment(0, 6, 0, {6: 5})]
