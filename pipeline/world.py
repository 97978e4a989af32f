"""Writes the videos of the generated egocentric world as H.264 files.

One video is one pure call of `write_video`, so that any pool can map over them. Everything is decided by the
WorldConfig; the frames of a clip can also be drawn in memory with `render_clip`, without any file.
"""

import hashlib
import json
import os
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
import av.error
import av.video.stream
import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.scene import Scene
from pipeline.script import VideoSpec, keyed_random

# Raised whenever the pictures of a spec change, so that files drawn by older code are not taken for complete.
DRAWING_VERSION = 3
KEYFRAME_S = 1.0
# Fine enough for every rate in the table and for irregular times.
TIME_BASE = Fraction(1, 90000)


def spec_key(spec: VideoSpec) -> str:
    """Returns a hash of everything that decides the content of a video file."""
    text = json.dumps([DRAWING_VERSION, asdict(spec)], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def frame_times_s(spec: VideoSpec) -> list[float]:
    """Returns the presentation times of all frames, seconds from 0; irregular where the format says so."""
    fps = spec.picture.fps
    num_frames = int(spec.duration_s * fps)
    if not spec.picture.has_variable_rate:
        return [float(index / fps) for index in range(num_frames)]
    # A camera that drops and delays frames: about one in eight is missing, the others come up to 8 ms late.
    rng = keyed_random(spec.look_seed, "frame times")
    times_s = [0.0]
    for index in range(1, num_frames):
        if rng.random() >= 0.125 or index == num_frames - 1:
            times_s.append(float(index / fps) + rng.uniform(0.0, 0.008))
    return times_s


def write_video(spec: VideoSpec, path: Path) -> bool:
    """Draws and encodes one video; returns False when the complete file of the same spec was already there.

    The file appears by rename only when it is whole. The key of the spec is stored as its comment.
    """
    key = spec_key(spec)
    if is_complete(spec, path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.mp4")
    try:
        _encode(spec, partial, key)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return True


def is_complete(spec: VideoSpec, path: Path) -> bool:
    """Says whether a file is the whole video of exactly this spec."""
    return path.exists() and _comment_of(path) == spec_key(spec)


def render_clip(
    spec: VideoSpec,
    start_s: float,
    end_s: float,
    num_frames: int,
    height: int | None = None,
    width: int | None = None,
) -> NDArray[np.uint8]:
    """Draws the frames at the midpoints of num_frames equal parts of [start_s, end_s]: THWC uint8 RGB."""
    scene = Scene(spec)
    step_s = (end_s - start_s) / num_frames
    frames = [scene.frame_at(start_s + step_s * (index + 0.5)) for index in range(num_frames)]
    if height is not None and width is not None:
        frames = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames]
    return np.stack(frames).astype(np.uint8, copy=False)


def _comment_of(path: Path) -> str | None:
    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment")
    except (av.error.FFmpegError, OSError):
        return None


def _encode(spec: VideoSpec, path: Path, key: str) -> None:
    scene = Scene(spec)
    fps = spec.picture.fps
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = key
        options = {"preset": "ultrafast", "crf": "25", "threads": "1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        assert isinstance(stream, av.video.stream.VideoStream)
        stream.width, stream.height, stream.pix_fmt = spec.picture.width, spec.picture.height, "yuv420p"
        stream.codec_context.gop_size = round(KEYFRAME_S * fps)
        stream.codec_context.time_base = TIME_BASE
        stream.codec_context.thread_count = 1
        planes = np.empty((spec.picture.height * 3 // 2, spec.picture.width), np.uint8)
        for time_s in frame_times_s(spec):
            cv2.cvtColor(scene.rgba_frame_at(time_s), cv2.COLOR_RGBA2YUV_I420, dst=planes)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = round(time_s / TIME_BASE), TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
