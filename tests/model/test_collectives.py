"""Two gloo processes give the value and the gradient of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from model.collectives import all_gather_rows, all_gather_with_gradient, is_distributed, local_rows
from model.config import ModelConfig
from model.step_key import StepKey
from model.video_text_model import VideoTextModel
from tests.model.tiny import tiny_batch, tiny_config


def _config() -> ModelConfig:
    # A learned temperature is used outside the gathered features: its gradient must come out right too.
    return tiny_config(vtm_weight=0, mlm_weight=0, learn_temperature=True)


def _loss_and_gradients(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = VideoTextModel(_config()).double()
    batch = tiny_batch(model.config).rows(rows)
    batch = batch._replace(video=batch.video.double())
    vtc = model(*batch, StepKey(0, 0, rows.start)).vtc
    vtc.backward()
    return vtc.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        result: dict[str, Any] = {"rows": all_gather_rows(torch.tensor([[rank], [rank + 10]]))}
        x = torch.tensor([1.0 + rank, 3.0 + rank], requires_grad=True)
        gathered = all_gather_with_gradient(x)
        (gathered * torch.arange(1.0, 5.0)).sum().backward()
        result |= {"gathered": gathered.detach(), "grad": x.grad, "local": local_rows(3)}
        result["loss"], gradients = _loss_and_gradients(slice(3 * rank, 3 * rank + 3))
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= 2
        result["gradients"] = gradients
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
def test_rows_come_in_rank_order_and_gradients_are_summed(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        assert result["rows"].tolist() == [[0], [10], [1], [11]]
        assert result["gathered"].tolist() == [1, 3, 2, 4]
        assert result["grad"].tolist() == [[2, 4], [6, 8]][rank]
        assert result["local"] == slice(3 * rank, 3 * rank + 3)


@pytest.mark.dist
def test_ego_nce_of_two_processes_equals_that_of_one_in_value_and_gradient(
    results: list[dict[str, Any]],
) -> None:
    loss, gradients = _loss_and_gradients(slice(0, 6))
    for result in results:
        torch.testing.assert_close(result["loss"], loss)
        assert result["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                result["gradients"][name], gradient, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_alone_nothing_is_gathered() -> None:
    rows = torch.ones(3, requires_grad=True)
    assert not is_distributed()
    assert all_gather_with_gradient(rows) is rows
    assert local_rows(3) == slice(0, 3)
