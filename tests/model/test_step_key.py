"""Keys: repeatable, and different wherever a part differs."""

import torch

from model.step_key import StepKey, derive_seed


def test_seeds_are_fixed_numbers() -> None:
    # Written down once: another value would change every run that is resumed.
    assert derive_seed(0, "edges", 0, 0) == 234966041787772720
    assert derive_seed("a", 1) == derive_seed("a", 1)


def test_every_part_of_a_key_matters() -> None:
    keys = [StepKey(0, 0, 0), StepKey(1, 0, 0), StepKey(0, 1, 0), StepKey(0, 0, 1)]
    numbers = {key.integer(purpose) for key in keys for purpose in ("mlm", "dropout")}
    assert len(numbers) == 8
    assert keys[0].integer("mlm", 1) != keys[0].integer("mlm")


def test_generators_repeat() -> None:
    key = StepKey(7, 3)
    first, second = (torch.rand(4, generator=key.generator("mlm")) for _ in range(2))
    assert torch.equal(first, second)


def test_all_ranks_share_one_key() -> None:
    assert StepKey(7, 3, 0).all_ranks() == StepKey(7, 3, 5).all_ranks()
    assert StepKey(7, 3, 0).all_ranks().integer("edges") != StepKey(7, 4, 0).all_ranks().integer("edges")
