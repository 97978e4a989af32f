"""A step computes the objective of its batch, whatever the micro-batch, the number of ranks and the engine."""

from pathlib import Path

import pytest

from tests.infra.two_ranks import run_two
from tests.jobs import gradient_cases as cases


@pytest.mark.parametrize("micro_batch_size", [None, 16, 8, 5, 1])
def test_micro_batches_on_one_rank(micro_batch_size: int | None) -> None:
    whole = cases.batch(16)
    engine = cases.engine_of(cases.PLAIN)
    result = cases.errors(engine, whole, micro_batch_size, 0, 1, cases.reference(whole))
    assert result.loss < 1e-6, result
    assert result.gradient < 1e-5, result
    assert result.parameter < 1e-4, result


@pytest.mark.dist
def test_two_ranks_under_every_engine(tmp_path: Path) -> None:
    run_two(cases.compare_on_two_ranks, 16, tmp_path)
