"""What `svitt bench data` compares loading with: a torch Dataset that opens the video of every clip, as LaViLa and
AVION do. Opens, seeks to the clip, decodes forward to the sampled frames, crops all of them by one window.

The reading is as quick as PyAV and torch allow, so that the comparison is not with slow code: one decoding thread a
worker, only sampled frames become RGB, and the resize runs on uint8 in the decoder's channel order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import av
import av.container
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from pipeline.augment import draw_window


@dataclass(frozen=True, slots=True)
class VideoClip:
    """A clip in its video file; times are seconds in that file."""

    clip_id: str
    path: str
    start_s: float
    end_s: float


class VideoClips(Dataset[UInt8[Tensor, "T C H W"]]):
    """Random frames of clips, cropped and resized to a square; uint8. The epoch only varies the draws."""

    def __init__(
        self,
        clips: Sequence[VideoClip],
        num_frames: int,
        image_size: int,
        crop_scale: tuple[float, float],
        crop_aspect: tuple[float, float],
        seed: int = 0,
    ) -> None:
        self._clips = tuple(clips)
        self._num_frames, self._image_size = num_frames, image_size
        self._crop_scale, self._crop_aspect = crop_scale, crop_aspect
        self._seed = seed

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, place: int) -> UInt8[Tensor, "T C H W"]:
        clip = self._clips[place]
        step_s = (clip.end_s - clip.start_s) / self._num_frames
        offsets = np.random.default_rng((self._seed, place)).random(self._num_frames)
        times_s = clip.start_s + step_s * (np.arange(self._num_frames) + offsets)
        frames_THWC = np.stack(read_frames(clip.path, times_s.tolist()))
        height, width = frames_THWC.shape[1:3]
        top, left, height, width = draw_window(
            self._seed, 0, clip.clip_id, height, width, self._crop_scale, self._crop_aspect
        )
        video_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
        crop_TCHW = video_TCHW[..., top : top + height, left : left + width]
        size = (self._image_size, self._image_size)
        return functional.interpolate(crop_TCHW, size, mode="bilinear", antialias=True)


def read_frames(path: str, times_s: Sequence[float]) -> list[UInt8[np.ndarray, "H W C"]]:
    """The first frame at or after each time, ascending; past the end of the file the last one again."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.time_base is not None
        start_s = float((stream.start_time or 0) * stream.time_base)
        container.seek(round((times_s[0] + start_s) / float(stream.time_base)), stream=stream)
        images: list[np.ndarray] = []
        frame = None
        for frame in container.decode(stream):
            while len(images) < len(times_s) and (frame.time or 0.0) - start_s >= times_s[len(images)]:
                images.append(frame.to_ndarray(format="rgb24"))
            if len(images) == len(times_s):
                return images
        if frame is None:
            raise ValueError(f"{path} has no frame from {times_s[0]:.3f} s on")
        return images + [frame.to_ndarray(format="rgb24")] * (len(times_s) - len(images))
