"""Gradients that are not finite, and disks that are full: what one rank meets reaches the others without a wait."""

from pathlib import Path

import fault_cases as cases
import pytest
from two_ranks import run_two


@pytest.mark.dist
def test_a_bad_gradient_of_one_rank_is_found_and_leaves_no_trace(tmp_path: Path) -> None:
    run_two(cases.leave_out_bad_gradients, "", tmp_path)


@pytest.mark.dist
def test_ranks_write_apart_and_one_that_cannot_write_keeps_no_other_waiting(tmp_path: Path) -> None:
    run_two(cases.save_apart, str(tmp_path), tmp_path)
    run_two(cases.survive_a_full_disk, str(tmp_path), tmp_path)
