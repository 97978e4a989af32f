"""Tiny videos for tests: every frame carries its number as a barcode of 16 wide bars."""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import av.logging
import numpy as np

SIZE_HW = (96, 128)
_BITS = 16
CODEC_OPTIONS = {
    "libx264": {"preset": "ultrafast", "g": "15", "tune": "fastdecode"},
    "libx264-bframes": {"preset": "medium", "g": "15", "bf": "3"},
    "libx264-opengop": {"preset": "medium", "g": "15", "bf": "3", "x264-params": "open-gop=1:log-level=none"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:keyint=15:bframes=3"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "g": "15"},
}
# Blurs the bars too much to read them back; compare its pictures with a plain decode.
AV1_OPTIONS = {"libsvtav1": {"preset": "12", "svtav1-params": "lp=1"}}


def barcode_frame(number: int, size_HW: tuple[int, int] = SIZE_HW) -> np.ndarray:
    """RGB image whose bars, left to right, are the bits of `number`; the top half is always white."""
    height, width = size_HW
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[: height // 2] = 255
    for bit in range(_BITS):
        if number >> bit & 1:
            image[height // 2 :, bit * width // _BITS : (bit + 1) * width // _BITS] = 255
    return image


def read_barcode(image: np.ndarray) -> int:
    """The number of `barcode_frame`, from an upright image of any size."""
    height, width = image.shape[:2]
    row = image[height * 5 // 8 : height * 7 // 8].mean(axis=(0, 2))
    centres = [(2 * bit + 1) * width // (2 * _BITS) for bit in range(_BITS)]
    return sum(1 << bit for bit, column in enumerate(centres) if row[column] > 128)


def write_video(
    path: Path,
    num_frames: int = 60,
    fps: Fraction | int = 30,
    codec: str = "libx264",
    times: Sequence[Fraction] | None = None,
    size_HW: tuple[int, int] = SIZE_HW,
    first_number: int = 0,
    rotation: int = 0,
    file_format: str | None = None,
) -> Path:
    """Frames first_number, first_number + 1, ... at i / fps, or at `times` (variable frame rate)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps)
    scheduling = os.sched_getscheduler(0), os.sched_getparam(0)
    with av.open(
        str(path), "w", format=file_format or ("webm" if path.suffix == ".webm" else "mp4")
    ) as container:
        stream = container.add_stream(codec.split("-opengop")[0].split("-bframes")[0], rate=rate)
        stream.options = {**CODEC_OPTIONS, **AV1_OPTIONS}[codec]
        stream.height, stream.width = size_HW
        stream.pix_fmt = "yuv420p"
        time_base = Fraction(1, 90000) if times is not None else 1 / rate
        stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        for position in range(num_frames):
            frame = av.VideoFrame.from_ndarray(
                barcode_frame(first_number + position, size_HW), format="rgb24"
            )
            frame.time_base = time_base
            frame.pts = int(times[position] / time_base) if times is not None else position
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    # Where it may, as root, SVT-AV1 gives the thread that starts it real-time priority, and leaves it so.
    os.sched_setscheduler(0, *scheduling)
    return path
