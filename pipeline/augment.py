"""Which frames and which window of a clip a batch shows: pure functions of (seed, epoch, clip id).

No horizontal flip: captions say left and right.
"""

import math
from typing import Literal

import numpy as np
from jaxtyping import Int64

from pipeline.errors import DataError
from pipeline.order import keyed_generator

FrameOrder = Literal["ordered", "shuffled", "reversed"]
# Top, left, height, width in pixels of the stored frame.
Window = tuple[int, int, int, int]

_ATTEMPTS = 10


def draw_window(
    seed: int,
    epoch: int,
    clip_id: str,
    height: int,
    width: int,
    crop_scale: tuple[float, float],
    crop_aspect: tuple[float, float],
) -> Window:
    """Random resized crop: area share even in `crop_scale`, shape log-even in `crop_aspect` times the frame's.

    The shape is relative to the frame's, as evaluation squeezes the whole frame into the square: a crop of
    absolute shape would show training another squeeze than evaluation. The window holds for all frames of the
    clip. When no draw fits, the whole frame is used.
    """
    generator = keyed_generator(seed, "crop", epoch, clip_id)
    for _attempt in range(_ATTEMPTS):
        area = height * width * generator.uniform(*crop_scale)
        jitter = math.exp(generator.uniform(math.log(crop_aspect[0]), math.log(crop_aspect[1])))
        aspect = jitter * width / height
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(0, height - crop_height + 1))
            left = int(generator.integers(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    return 0, 0, height, width


def draw_frames(
    seed: int, epoch: int, clip_id: str, num_stored: int, num_frames: int
) -> Int64[np.ndarray, " T"]:
    """One stored frame out of each of `num_frames` equal segments, in order of time."""
    bounds = _segment_bounds(num_stored, num_frames)
    generator = keyed_generator(seed, "frames", epoch, clip_id)
    return generator.integers(bounds[:-1], bounds[1:], dtype=np.int64)


def middle_frames(num_stored: int, num_frames: int) -> Int64[np.ndarray, " T"]:
    """The stored frame at the middle of each of `num_frames` equal segments, in order of time."""
    _segment_bounds(num_stored, num_frames)
    return ((2 * np.arange(num_frames, dtype=np.int64) + 1) * num_stored) // (2 * num_frames)


def _segment_bounds(num_stored: int, num_frames: int) -> Int64[np.ndarray, " T+1"]:
    if not 1 <= num_frames <= num_stored:
        raise DataError(
            f"{num_frames} frames wanted per clip, {num_stored} are stored; raise prepare.num_frames and run "
            "prepare again, or ask for fewer"
        )
    return (np.arange(num_frames + 1, dtype=np.int64) * num_stored) // num_frames


def reorder_frames(
    frames: Int64[np.ndarray, " T"], frame_order: FrameOrder, seed: int, clip_id: str
) -> Int64[np.ndarray, " T"]:
    """Frames for the temporal probe: in order, backwards, or in a drawn order that is never the true one."""
    if frame_order == "ordered" or len(frames) == 1:
        return frames
    if frame_order == "reversed":
        return frames[::-1].copy()
    generator = keyed_generator(seed, "frame order", clip_id)
    places = np.arange(len(frames))
    shuffled = places
    while np.array_equal(shuffled, places):
        shuffled = generator.permutation(len(frames))
    return frames[shuffled]
