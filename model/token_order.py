"""The order in which patches are cut into blocks: row by row, or along a space-filling curve (SViTT's option).

It changes only which patches share a block. Positions stay those of the clip.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from model.config import VideoConfig


def token_order(config: VideoConfig) -> Int[Tensor, " n"]:
    """Clip position (frame by frame, row by row) of every patch in the order in which blocks are cut.

    `raster` leaves them as they are, so that a block is a piece of a few rows of one frame. Along the curves a block
    is a small cube of space and time: `zcurve` is Morton's with time as the fastest axis, `hilbert` Hilbert's, on
    which successive patches are neighbours.
    """
    side = config.grid
    position = torch.arange(config.num_patches)
    if config.token_order == "raster":
        return position
    axes = [position // side**2, position // side % side, position % side]
    num_bits = max(config.num_frames, side).bit_length()
    if config.token_order == "zcurve":
        return _interleave(axes[::-1], num_bits).argsort()
    return _interleave(_hilbert_transpose(axes, num_bits), num_bits).argsort()


def _interleave(axes: list[Tensor], num_bits: int) -> Tensor:
    """One number of the bits of all axes, the first axis highest within each group."""
    number = torch.zeros_like(axes[0])
    for bit in reversed(range(num_bits)):
        for axis in axes:
            number = (number << 1) | (axis >> bit & 1)
    return number


def _hilbert_transpose(axes: list[Tensor], num_bits: int) -> list[Tensor]:
    """Coordinates to the bits of the Hilbert index, spread over the axes (Skilling, AIP Conf. Proc. 707, 381, 2004)."""
    axes = list(axes)
    for bit in reversed(range(1, num_bits)):
        low = (1 << bit) - 1
        for number, axis in enumerate(axes):
            is_set = (axis >> bit & 1).bool()
            swapped = torch.where(is_set, 0, (axes[0] ^ axis) & low)
            axes[0] = torch.where(is_set, axes[0] ^ low, axes[0] ^ swapped)
            # The first axis swaps with itself: nothing to do.
            if number:
                axes[number] = axis ^ swapped
    for number in range(1, len(axes)):
        axes[number] = axes[number] ^ axes[number - 1]
    gray = torch.zeros_like(axes[0])
    for bit in reversed(range(1, num_bits)):
        gray = torch.where((axes[-1] >> bit & 1).bool(), gray ^ ((1 << bit) - 1), gray)
    return [axis ^ gray for axis in axes]
