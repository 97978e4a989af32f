"""The one resize of the project, linear with antialiasing when shrinking: by torch on the CPU, by DALI on the GPU.

torch's is a quarter of the CPU time of DALI's and, in fixed point, the same to the bit on every processor. The two
differ by at most 2 levels inside a picture; at its border DALI repeats the last pixel where torch leaves it out.
DALI has no JPEG encoder, so OpenCV writes the JPEG bytes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIInterpType
from torch import Tensor
from torch.nn import functional

from pipeline.errors import DataError


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the short side at `short_side`, shape kept; smaller frames stay as they are."""
    if min(height, width) <= short_side:
        return height, width
    if height <= width:
        return short_side, max(1, round(width * short_side / height))
    return max(1, round(height * short_side / width)), short_side


def resize_frames(
    frames_NHWC: UInt8[Tensor, "N H W C"], height: int, width: int
) -> UInt8[Tensor, "N C height width"]:
    """Frames of one size on the CPU, channels last in memory, as the quick path of torch wants them and leaves them."""
    frames_NCHW = frames_NHWC.permute(0, 3, 1, 2)
    return functional.interpolate(frames_NCHW, (height, width), mode="bilinear", antialias=True)


def resize_graph(images: Any, height: Any, width: Any) -> Any:
    """The same as a node of a DALI graph, for the GPU."""
    return fn.resize(
        images, resize_y=height, resize_x=width, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True
    )


class FrameResizer:
    """Shrinks frames of any sizes to a short side; sizes may differ from frame to frame."""

    def __init__(self, short_side: int, device: Literal["cpu", "gpu"] = "cpu", max_frames: int = 16) -> None:
        self.short_side = short_side
        self._dali = _DaliResizer(max_frames, device_id=0) if device == "gpu" else None

    def resize(self, frames: Sequence[UInt8[np.ndarray, "H W C"]]) -> list[UInt8[np.ndarray, "h w C"]]:
        """Frames in the order given; those that are small enough stay as they are."""
        sizes = [short_side_size(frame.shape[0], frame.shape[1], self.short_side) for frame in frames]
        if self._dali is not None:
            return self._dali.resize(frames, sizes)
        return [
            frame if frame.shape[:2] == size else _resize_frame(frame, *size)
            for frame, size in zip(frames, sizes, strict=True)
        ]


def _resize_frame(
    frame_HWC: UInt8[np.ndarray, "H W C"], height: int, width: int
) -> UInt8[np.ndarray, "height width C"]:
    # Added by torch: a first axis made by numpy has stride 0, which torch does not take for channels last.
    frame_NHWC = torch.from_numpy(frame_HWC)[None]
    return resize_frames(frame_NHWC, height, width)[0].permute(1, 2, 0).numpy()


class _DaliResizer:
    """`resize_graph` on its own, built once for every batch; without a device it runs on the CPU."""

    def __init__(self, max_frames: int, device_id: int | None) -> None:
        self._max_frames = max_frames
        self._pipeline = Pipeline(
            batch_size=max_frames,
            num_threads=1,
            device_id=device_id,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self._pipeline:
            frames = fn.external_source(name="frames", dtype=DALIDataType.UINT8, ndim=3, layout="HWC")
            height = fn.external_source(name="height", dtype=DALIDataType.FLOAT, ndim=0)
            width = fn.external_source(name="width", dtype=DALIDataType.FLOAT, ndim=0)
            moved = frames.gpu() if device_id is not None else frames
            self._pipeline.set_outputs(resize_graph(moved, height, width))
        self._pipeline.build()

    def resize(self, frames: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Frames to their (height, width)."""
        resized: list[np.ndarray] = []
        for first in range(0, len(frames), self._max_frames):
            group = list(frames[first : first + self._max_frames])
            wanted = sizes[first : first + self._max_frames]
            (output,) = self._pipeline.run(
                frames=group,
                height=[np.float32(height) for height, _width in wanted],
                width=[np.float32(width) for _height, width in wanted],
            )
            on_host = output.as_cpu()
            resized.extend(np.array(on_host.at(position)) for position in range(len(group)))
        return resized


def encode_jpeg(image: UInt8[np.ndarray, "H W C"], quality: int) -> bytes:
    """JPEG bytes of an RGB image. Raises DataError when the encoder refuses the image."""
    is_encoded, buffer = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    if not is_encoded:
        raise DataError(
            f"encoded a frame of {image.shape[1]} x {image.shape[0]} as JPEG: the encoder refused it"
        )
    return buffer.tobytes()
