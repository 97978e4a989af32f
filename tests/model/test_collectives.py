"""Two gloo processes gather and add what each holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from model.collectives import all_gather_rows, is_distributed, local_rows, sum_over_ranks
from model.contrastive_tiles import contrastive_tiles
from tests.model.contrastive_cases import CASES, features_and_tags


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        mine = torch.tensor([1.0 + rank])
        result: dict[str, Any] = {
            "rows": all_gather_rows(torch.tensor([[rank], [rank + 10]])),
            "sum": sum_over_ranks(mine),
            "mine": mine,
            "local": local_rows(3),
        }
        for number, case in enumerate(CASES):
            text, video, temperature, tags = features_and_tags(12)
            rows = slice(6 * rank, 6 * rank + 6)
            result[f"case {number}"] = contrastive_tiles(
                text[rows], video[rows], temperature, tags.rows(rows), **case, tile=4
            )
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("gloo")
    with pytest.MonkeyPatch.context() as patch:
        # The processes import this module by name, for which the root of the repository must be on the path.
        patch.syspath_prepend(str(Path(__file__).parents[2]))
        multiprocessing.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.dist
def test_rows_come_in_rank_order_and_sums_leave_what_they_add(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        assert result["rows"].tolist() == [[0], [10], [1], [11]]
        assert result["sum"].tolist() == [3]
        assert result["mine"].tolist() == [1 + rank]
        assert result["local"] == slice(3 * rank, 3 * rank + 3)


@pytest.mark.dist
@pytest.mark.parametrize("number", range(len(CASES)))
def test_contrastive_loss_of_two_processes_equals_that_of_one(
    number: int, results: list[dict[str, Any]]
) -> None:
    whole = contrastive_tiles(*features_and_tags(12), **CASES[number])
    parts = [result[f"case {number}"] for result in results]
    for part in parts:
        torch.testing.assert_close(part.loss, whole.loss)
        torch.testing.assert_close(part.accuracy, whole.accuracy)
        torch.testing.assert_close(part.temperature_gradient, whole.temperature_gradient)
    for name in ("text_gradient_BP", "video_gradient_BP"):
        both = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(both, getattr(whole, name))


def test_alone_nothing_is_gathered() -> None:
    rows = torch.ones(3)
    assert not is_distributed()
    assert all_gather_rows(rows) is rows
    assert sum_over_ranks(rows) is rows
    assert local_rows(3) == slice(0, 3)
