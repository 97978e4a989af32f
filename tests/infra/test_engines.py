"""PlainEngine by hand; DeepSpeedEngine against PlainEngine; resuming bit for bit."""

from pathlib import Path

import engine_cases as cases
import pytest
import torch
from engine_cases import groups, tiny, train
from torch import nn
from two_ranks import run_two

from infra.config import EngineConfig
from infra.engine import EngineError, PlainEngine, build_engine


def test_the_first_step_of_the_plain_engine_is_adamw_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(2.0)
    config = EngineConfig(backend="plain", weight_decay=0.1, eps=1e-8)
    engine = build_engine(module, [{"params": [module.weight]}], config, micro_batch_size=1)
    engine.backward(3 * engine.module(torch.ones(1, 1)).sum())
    engine.step(lr=0.01)
    # gradient 3; bias-corrected first step moves by lr; decay takes lr * 0.1 * 2.
    assert engine.grad_norm == pytest.approx(3.0)
    assert module.weight.item() == pytest.approx(2.0 - 0.01 * 0.1 * 2.0 - 0.01, abs=1e-6)


def test_clipping_limits_the_norm_but_reports_it_unclipped() -> None:
    module = nn.Linear(2, 1, bias=False)
    engine = PlainEngine(
        module, [{"params": [module.weight]}], EngineConfig(backend="plain", gradient_clipping=1.0, eps=1.0)
    )
    engine.backward((engine.module(torch.tensor([[3.0, 4.0]]))).sum())
    before = module.weight.detach().clone()
    engine.step(lr=1.0)
    assert engine.grad_norm == pytest.approx(5.0)
    # With eps 1 and clipped gradient (0.6, 0.8): update g / (|g| + 1); weight decay 0.02 * w on top.
    expected = before * (1 - 0.02) - torch.tensor([[0.6 / 1.6, 0.8 / 1.8]])
    torch.testing.assert_close(module.weight.detach(), expected, atol=1e-5, rtol=1e-5)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    whole, parts = (PlainEngine(m, groups(m), EngineConfig(backend="plain")) for m in (tiny(), tiny()))
    norms = train(whole, 0, range(2), num_micro=1), train(parts, 0, range(2), num_micro=2)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_plain_engine_resumes_bit_for_bit(tmp_path: Path) -> None:
    module = tiny()
    engine = PlainEngine(module, groups(module), EngineConfig(backend="plain", precision="bf16"))
    train(engine, 0, range(2))
    engine.save(tmp_path)
    train(engine, 0, range(2, 4))
    fresh = tiny(seed=9)
    resumed = PlainEngine(fresh, groups(fresh), EngineConfig(backend="plain", precision="bf16"))
    resumed.load(tmp_path)
    train(resumed, 0, range(2, 4))
    for name, tensor in engine.consolidated_state_dict().items():
        assert torch.equal(tensor, resumed.consolidated_state_dict()[name]), name


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    module = tiny()
    with pytest.raises(EngineError, match=r"no plain_engine\.pt"):
        PlainEngine(module, groups(module), EngineConfig(backend="plain")).load(tmp_path)


@pytest.mark.dist
def test_every_zero_stage_equals_the_plain_engine_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    run_two(cases.compare_all_and_save, str(folder), tmp_path)
    assert not list(folder.rglob("*.py"))
    run_two(cases.load_and_train, str(folder), tmp_path)
    run_two(cases.load_at_another_size, str(folder), tmp_path, world_size=1)


@pytest.mark.dist
def test_many_backward_calls_give_the_gradients_of_the_plain_engine(tmp_path: Path) -> None:
    run_two(cases.compare_accumulation, "", tmp_path)
