"""Random numbers of a row: functions of (step, clip, place of the draw, position), whatever stands beside the row.

A batch then has one loss, in one piece or in micro-batches, on one rank or on many, computed once or twice. A
generator that is read in turn cannot give that.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B9 - 2**32
_INT32 = 2**32


@dataclass(frozen=True)
class RowDraws:
    """Draws of the B rows that carry these keys. Equal keys draw equal numbers."""

    keys_B: Int[Tensor, " B"]  # int32

    @staticmethod
    def of(seed: int, clip_index_B: Int[Tensor, " B"]) -> "RowDraws":
        """Keys of clips in one step; `seed` is any integer of 64 bits."""
        return RowDraws(_mix64(clip_index_B.long() ^ _signed(seed, 64)))

    def at(self, place: int) -> "RowDraws":
        """The same rows at another place of the model, where they draw independently of here."""
        return RowDraws(mix(self.keys_B + _signed(place * 0x9E3779B9 + 0x7F4A7C15, 32)))

    def rows(self, index_Q: Int[Tensor, " Q"]) -> "RowDraws":
        """Draws of chosen rows."""
        return RowDraws(self.keys_B[index_Q])

    def paired(self, other: "RowDraws") -> "RowDraws":
        """Draws of pairs (row i here, row i there)."""
        return RowDraws(mix(self.keys_B + mix(other.keys_B)))

    def bits(self, *shape: int) -> Int[Tensor, "B ..."]:
        """32 even bits, as int32, for each row and position."""
        count = 1
        for size in shape:
            count *= size
        positions = torch.arange(count, dtype=torch.int32, device=self.keys_B.device)
        counters = mix(positions * _GOLDEN).view(1, *shape)
        return mix(self.keys_B.view(-1, *([1] * len(shape))) ^ counters)

    def uniform(self, *shape: int) -> Float[Tensor, "B ..."]:
        """Even numbers in [0, 1) with 24 bits."""
        return ((self.bits(*shape) >> 8) & 0xFFFFFF).float() / 2**24

    def keep(self, rate: float, *shape: int) -> Bool[Tensor, "B ..."]:
        """False with probability `rate`."""
        return self.bits(*shape) >= round(rate * _INT32) - 2**31

    def dropout(self, rows_BX: Float[Tensor, "B ..."], rate: float) -> Float[Tensor, "B ..."]:
        """Zero each element with probability `rate`, scale the others by 1 / (1 - rate)."""
        if rate == 0:
            return rows_BX
        return (rows_BX * self.keep(rate, *rows_BX.shape[1:])).mul_(1 / (1 - rate))


def mix(bits: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Bijective scrambling of int32 (the multipliers and shifts of Wellons' `lowbias32`)."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits *= 0x7FEB352D
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x846CA68B - 2**32
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def _mix64(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64; its upper half, as int32."""
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB, 64)
    return (bits >> 32).int()


def _signed(number: int, width: int) -> int:
    number &= 2**width - 1
    return number - 2**width if number >> (width - 1) else number
