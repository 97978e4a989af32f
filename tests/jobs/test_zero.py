"""The whole model under DeepSpeed ZeRO 1, 2 and 3 on two ranks: what the plain engine computes."""

from pathlib import Path

import pytest

from tests.infra.two_ranks import run_two
from tests.jobs.zero_cases import compare_stages


@pytest.mark.dist
def test_every_zero_stage_trains_the_real_model_as_the_plain_engine_does(tmp_path: Path) -> None:
    run_two(compare_stages, "", tmp_path)
