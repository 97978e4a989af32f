"""What ranks tell one another, between two processes and with nobody there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.ranks import SingleRank, ranks_of_group
from tests.infra.two_ranks import run_two


def _two_agree(rank: int, _: Any) -> None:
    ranks = ranks_of_group(torch.device("cpu"))
    assert (ranks.rank, ranks.world_size) == (rank, 2)
    assert ranks.mean([float(rank), 4.0]) == [0.5, 4.0]
    assert ranks.max([float(rank), -float(rank)]) == [1.0, 0.0]
    assert ranks.any(rank == 1)
    assert not ranks.any(False)
    assert ranks.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    ranks.barrier()


def _one_is_asked_nothing(rank: int, _: Any) -> None:
    assert isinstance(ranks_of_group(torch.device("cpu")), SingleRank)


@pytest.mark.dist
def test_two_ranks_tell_each_other_and_one_is_asked_nothing(tmp_path: Path):
    run_two(_two_agree, None, tmp_path)
    run_two(_one_is_asked_nothing, None, tmp_path, world_size=1)


def test_one_rank_alone_has_its_own_values():
    ranks = SingleRank()
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert (ranks.mean([2.0]), ranks.max([3.0]), ranks.any(True), ranks.gather("x")) == (
        [2.0],
        [3.0],
        True,
        ["x"],
    )
