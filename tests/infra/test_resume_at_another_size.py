"""A checkpoint of two ranks goes on at one, and that of one at two: the same state, the same losses, one copy of it."""

from pathlib import Path

import pytest
import resume_cases as cases
from two_ranks import run_two


@pytest.mark.dist
def test_two_ranks_then_one_then_two_compute_what_two_calm_ranks_do(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    run_two(cases.calm_run, str(folder), tmp_path)
    run_two(cases.go_on_alone, str(folder), tmp_path, world_size=1)
    run_two(cases.go_on_in_two, str(folder), tmp_path)
    run_two(cases.refuse_code, str(folder), tmp_path, world_size=1)
    run_two(cases.refuse_code, str(folder), tmp_path)
    run_two(cases.refuse_what_cannot_be_divided, str(folder), tmp_path, world_size=1)


@pytest.mark.dist
def test_a_load_restores_frozen_parameters_and_keeps_one_copy_of_the_state(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    run_two(cases.save_partly_frozen, str(folder), tmp_path)
    run_two(cases.load_partly_frozen_alone, str(folder), tmp_path, world_size=1)
