"""Resizing by DALI, on the CPU or the GPU with the same graph, and JPEG encoding of stored frames.

DALI has no JPEG encoder, so OpenCV writes the JPEG bytes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIInterpType

from pipeline.errors import DataError


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the short side at `short_side`, shape kept; smaller frames stay as they are."""
    if min(height, width) <= short_side:
        return height, width
    if height <= width:
        return short_side, max(1, round(width * short_side / height))
    return max(1, round(height * short_side / width)), short_side


def resize_graph(images: Any, height: Any, width: Any) -> Any:
    """The one resize of the project as a DALI graph node: linear, with antialiasing when shrinking."""
    return fn.resize(
        images, resize_y=height, resize_x=width, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True
    )


class FrameResizer:
    """Shrinks frames of any sizes to a short side. The DALI pipeline is built once and serves every batch."""

    def __init__(
        self,
        short_side: int,
        device: Literal["cpu", "gpu"] = "cpu",
        max_frames: int = 16,
        num_threads: int = 1,
    ) -> None:
        self.short_side = short_side
        self.max_frames = max_frames
        self._pipeline = Pipeline(
            batch_size=max_frames,
            num_threads=num_threads,
            device_id=0 if device == "gpu" else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self._pipeline:
            frames = fn.external_source(name="frames", dtype=DALIDataType.UINT8, ndim=3, layout="HWC")
            height = fn.external_source(name="height", dtype=DALIDataType.FLOAT, ndim=0)
            width = fn.external_source(name="width", dtype=DALIDataType.FLOAT, ndim=0)
            moved = frames.gpu() if device == "gpu" else frames
            self._pipeline.set_outputs(resize_graph(moved, height, width))
        self._pipeline.build()

    def resize(self, frames: Sequence[UInt8[np.ndarray, "H W C"]]) -> list[UInt8[np.ndarray, "h w C"]]:
        """Frames in the order given, each shrunk to the short side; sizes may differ from frame to frame."""
        resized: list[np.ndarray] = []
        for first in range(0, len(frames), self.max_frames):
            group = list(frames[first : first + self.max_frames])
            sizes = [short_side_size(frame.shape[0], frame.shape[1], self.short_side) for frame in group]
            (output,) = self._pipeline.run(
                frames=group,
                height=[np.float32(height) for height, _width in sizes],
                width=[np.float32(width) for _height, width in sizes],
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
