"""Keys: repeatable, and different wherever a part differs."""

import torch

from model.step_key import StepKey, derive_seed


def test_seeds_are_fixed_numbers() -> None:
    # Written down once: another value would change every run that is resumed.
    assert derive_seed(0, "edges", 0, 0) == 234966041787772720
    assert derive_seed("a", 1) == derive_seed("a", 1)


def test_every_part_of_a_key_matters() -> None:
    keys = [StepKey(0, 0), StepKey(1, 0), StepKey(0, 1)]
    numbers = {key.integer(purpose) for key in keys for purpose in ("mlm", "edges")}
    assert len(numbers) == 6


def test_rows_draw_by_their_clip_and_purpose() -> None:
    clips = torch.tensor([4, 9, 4])
    keys = StepKey(7, 3).rows("text", clips).keys_B
    assert keys[0] == keys[2] != keys[1]
    assert torch.equal(keys, StepKey(7, 3).rows("text", clips).keys_B)
    assert not (keys == StepKey(7, 3).rows("video", clips).keys_B).any()
    assert not (keys == StepKey(7, 4).rows("text", clips).keys_B).any()
