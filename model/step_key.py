"""Randomness as a function of (seed, purpose, step, rank): every draw of the model takes its seed from
here.
"""

import hashlib
from dataclasses import dataclass, replace

import torch


def derive_seed(*parts: int | str) -> int:
    """63-bit integer that depends on all parts and their order, the same on every machine (BLAKE2b)."""
    text = "/".join(str(part) for part in parts).encode("ascii")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, slots=True)
class StepKey:
    """Names one optimizer step on one rank. Draws differ by purpose, step and rank, and repeat exactly."""

    seed: int
    step: int
    rank: int = 0

    def integer(self, purpose: str, *index: int) -> int:
        """Seed for one purpose; `index` separates several draws of the same purpose."""
        return derive_seed(self.seed, purpose, self.step, self.rank, *index)

    def generator(self, purpose: str, *index: int) -> torch.Generator:
        """CPU generator for one purpose. Draws are made on the CPU so that every device sees the same
        ones.
        """
        return torch.Generator().manual_seed(self.integer(purpose, *index))

    def all_ranks(self) -> "StepKey":
        """The key that all ranks share in this step, for draws that must agree (random edges)."""
        return replace(self, rank=-1)
