"""Randomness as a function of (seed, step, purpose): every draw of the model takes its seed from here."""

import hashlib
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from model.row_draws import RowDraws


def derive_seed(*parts: int | str) -> int:
    """63-bit integer that depends on all parts and their order, the same on every machine (BLAKE2b)."""
    text = "/".join(str(part) for part in parts).encode("ascii")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, slots=True)
class StepKey:
    """Names one optimizer step. Its draws differ by purpose and repeat exactly; all ranks hold the same key."""

    seed: int
    step: int

    def integer(self, purpose: str) -> int:
        """Seed of what the whole batch shares, such as random edges."""
        return derive_seed(self.seed, purpose, self.step)

    def rows(self, purpose: str, clip_index_B: Int[Tensor, " B"]) -> RowDraws:
        """Draws of single clips or captions."""
        return RowDraws.of(self.integer(purpose), clip_index_B)
