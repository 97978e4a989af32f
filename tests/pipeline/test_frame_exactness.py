"""A thousand random times in every kind of video, by both decoders, against the times it was written with.

Times are whole ticks of 1/90000 s, so that what is nearest, and what is a tie, is decided exactly.
"""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from video_files import read_barcode, write_video

from pipeline.decode import PyAvDecoder
from pipeline.decode_dali import DaliGpuDecoder, DaliSegmentDecoder
from pipeline.frame_match import DecodedFrame, FrameRequest
from pipeline.video import resolve_timeline

TICKS_PER_S, TICKS_PER_MS = 90_000, 90
NUM_REQUESTS = 1000
SIZE_HW = (48, 64)

# Gaps of 8 to 250 ms, none like the one before.
UNEVEN_TICKS = TICKS_PER_MS * np.cumsum(np.random.default_rng(1).integers(8, 251, 200))
UNEVEN_TICKS -= UNEVEN_TICKS[0]

# How a video is written, and when its frames are shown.
VIDEOS = {
    "25 fps": ({"fps": 25}, 3600 * np.arange(500)),
    "29.97 fps": ({"fps": Fraction(30000, 1001)}, 3003 * np.arange(600)),
    "30 fps": ({"fps": 30}, 3000 * np.arange(600)),
    "variable rate": ({"times": [Fraction(int(tick), TICKS_PER_S) for tick in UNEVEN_TICKS]}, UNEVEN_TICKS),
    "turned clockwise": ({"fps": 30, "rotation": -90}, 3000 * np.arange(600)),
    "upside down": ({"fps": 25, "rotation": 180}, 3600 * np.arange(500)),
}


def decode_by_number(encoded, frame_numbers):
    """Stands in for DALI, which does not turn pictures: frames of a stream in memory by their number."""
    wanted = set(frame_numbers)
    with av.open(io.BytesIO(encoded)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        images = {
            number: frame.to_ndarray(format="rgb24")
            for number, frame in enumerate(container.decode(video=0))
            if number in wanted
        }
    return np.stack([images[number] for number in frame_numbers])


# How to build a decoder, and how many requests a pass gets. Few lie far apart, so that PyAV seeks; DALI's side
# works out all times first and never seeks.
DECODERS = {"pyav": (PyAvDecoder, 25), "dali": (lambda: DaliGpuDecoder(decode_by_number), 200)}


def draw_requests(frame_ticks, seed):
    """(time, end of its clip) in ticks: whole milliseconds up to the last frame, clips up to 3 s longer."""
    generator = np.random.default_rng(seed)
    time_ms = generator.integers(0, frame_ticks[-1] // TICKS_PER_MS + 1, NUM_REQUESTS)
    end_ms = time_ms + generator.integers(1, 3001, NUM_REQUESTS)
    return time_ms * TICKS_PER_MS, end_ms * TICKS_PER_MS


def nearest(frame_ticks, time_ticks, end_ticks):
    """Number of the frame nearest to the time of those shown before the end, the earlier one of a tie."""
    shown = frame_ticks[frame_ticks < end_ticks]
    return int(np.abs(shown - time_ticks).argmin())


def numbers_found(decoder, timeline, requests, requests_per_pass, rotation=0):
    """Barcodes of the answers, request by request."""
    found = {}
    for first in range(0, len(requests), requests_per_pass):
        several = requests[first : first + requests_per_pass]
        for position, answer in decoder.decode_frames(timeline, several):
            assert isinstance(answer, DecodedFrame), answer
            assert first + position not in found
            as_stored = np.rot90(answer.image, -rotation // 90)
            found[first + position] = read_barcode(as_stored)
    return [found[position] for position in range(len(requests))]


def check(decoder, timeline, frame_ticks, seed, requests_per_pass, rotation=0):
    """Every answer is the nearest frame."""
    time_ticks, end_ticks = draw_requests(frame_ticks, seed)
    expected = [nearest(frame_ticks, time, end) for time, end in zip(time_ticks, end_ticks, strict=True)]
    requests = [
        FrameRequest(time / TICKS_PER_S, end / TICKS_PER_S)
        for time, end in zip(time_ticks, end_ticks, strict=True)
    ]
    found = numbers_found(decoder, timeline, requests, requests_per_pass, rotation)
    wrong = [
        (request, right, got)
        for request, right, got in zip(requests, expected, found, strict=True)
        if right != got
    ]
    assert not wrong, f"{len(wrong)} of {NUM_REQUESTS}, first (request, expected, found) {wrong[0]}"


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.parametrize("kind", list(VIDEOS))
def test_a_thousand_times_find_their_nearest_frame(tmp_path, kind, decoder):
    settings, frame_ticks = VIDEOS[kind]
    path = tmp_path / "v.mp4"
    write_video(path, num_frames=len(frame_ticks), codec="libx264-bframes", size_HW=SIZE_HW, **settings)
    timeline = resolve_timeline(tmp_path, "v", "raw")
    build, requests_per_pass = DECODERS[decoder]
    check(build(), timeline, frame_ticks, 2, requests_per_pass, settings.get("rotation", 0))


def test_dali_itself_finds_the_nearest_frame_in_vp9(tmp_path):
    frame_ticks = 3003 * np.arange(600)
    write_video(tmp_path / "v.mp4", 600, Fraction(30000, 1001), "libvpx-vp9", size_HW=SIZE_HW)
    decoder = DaliGpuDecoder(DaliSegmentDecoder("cpu"))
    check(decoder, resolve_timeline(tmp_path, "v", "raw"), frame_ticks, 3, 200)


# 21 minutes at two frames per second: 84 files of 15 s, five of 300 s, three of 600 s, or one.
LONG_FPS, LONG_S = 2, 1260
CHUNK_NAMES = {
    "avion_15s": [(f"v.mp4/{start}.mp4", start) for start in range(0, LONG_S, 15)],
    "lavila_300s": [(f"v.mp4/{start}.mp4", start) for start in range(0, LONG_S, 300)],
    "egovlp_600s": [(f"v/{start // 600}.mp4", start) for start in range(0, LONG_S, 600)],
    "raw": [("v.mp4", 0)],
}


@pytest.mark.parametrize("layout", list(CHUNK_NAMES))
def test_a_thousand_times_find_the_same_frames_however_the_video_is_cut(tmp_path, layout):
    starts = [start for _name, start in CHUNK_NAMES[layout]]
    for (name, start), end in zip(CHUNK_NAMES[layout], [*starts[1:], LONG_S], strict=True):
        num_frames, first_number = (end - start) * LONG_FPS, start * LONG_FPS
        write_video(
            tmp_path / name, num_frames, LONG_FPS, "libx264", size_HW=SIZE_HW, first_number=first_number
        )
    timeline = resolve_timeline(tmp_path, "v", layout)
    frame_ticks = TICKS_PER_S // LONG_FPS * np.arange(LONG_S * LONG_FPS)
    check(PyAvDecoder(), timeline, frame_ticks, 4, 200)
    check(DaliGpuDecoder(decode_by_number), timeline, frame_ticks, 5, 500)
