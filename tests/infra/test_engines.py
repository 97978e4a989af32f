"""PlainEngine by hand; DeepSpeedEngine against PlainEngine; resuming bit for bit."""

import math
import re
import sys
from pathlib import Path

import engine_cases as cases
import pytest
import torch
from engine_cases import groups, tiny, train
from fault_cases import disk_full
from torch import nn
from two_ranks import run_two

from infra.config import EngineConfig
from infra.engine import EngineError, PlainEngine, adamw, all_finite, build_engine, require_precision


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


@pytest.mark.dist
def test_many_backward_calls_give_the_gradients_of_the_plain_engine(tmp_path: Path) -> None:
    run_two(cases.compare_accumulation, "", tmp_path)


def plain(**settings: object) -> PlainEngine:
    module = tiny()
    return PlainEngine(module, groups(module), EngineConfig(backend="plain", **settings))  # type: ignore[arg-type]


def test_gradients_are_those_of_the_step_and_zero_where_none_came() -> None:
    engine = plain()
    engine.backward(engine.module.scale.sum() * 3)
    gradients = engine.gradients()
    assert gradients["scale"].item() == 3
    assert not gradients["first.weight"].any()
    engine.step(lr=0.1)
    assert engine.grad_norm == pytest.approx(3)


def test_calls_out_of_order_are_refused() -> None:
    engine = plain()

    def loss() -> torch.Tensor:
        return engine.module(torch.ones(1, 3)).sum()

    with pytest.raises(EngineError, match=r"step\(\) was called after 0 backward calls"):
        engine.step(lr=0.1)
    engine.backward(loss())
    with pytest.raises(EngineError, match=r"backward\(\) was called after 1 backward calls .* accumulate"):
        engine.backward(loss())
    with (
        pytest.raises(EngineError, match=r"accumulate\(\) was entered after 1 backward"),
        engine.accumulate(),
    ):
        pass
    engine.step(lr=0.1)
    with engine.accumulate():
        engine.backward(loss())
        with pytest.raises(EngineError, match=r"step\(\) was called inside accumulate"):
            engine.step(lr=0.1)
        with pytest.raises(EngineError, match=r"gradients\(\) was called inside accumulate"):
            engine.gradients()
        with pytest.raises(EngineError, match=r"has_finite_gradient\(\) was called inside accumulate"):
            engine.has_finite_gradient()
    engine.step(lr=0.1)
    with pytest.raises(EngineError, match="after 0 backward calls"), engine.accumulate():
        raise EngineError("after 0 backward calls")
    with pytest.raises(EngineError, match=r"after an error had ended accumulate\(\)"):
        engine.step(lr=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_found_and_refused(value: float) -> None:
    engine = plain()
    before = engine.consolidated_state_dict()
    engine.backward(engine.module.get_parameter("second.bias")[0] * value)
    assert not engine.has_finite_gradient()
    with pytest.raises(EngineError, match="not finite and updated nothing"):
        engine.step(lr=0.1)
    for name, tensor in engine.consolidated_state_dict().items():
        assert torch.equal(tensor, before[name]), name
    engine.backward(engine.module.get_parameter("second.bias")[0] * 3e38)
    assert engine.has_finite_gradient()


def test_extremes_show_what_is_not_finite_in_any_place_and_type() -> None:
    assert all_finite([])
    assert all_finite([torch.zeros(0), torch.tensor([3e38, -3e38])])
    for bad in (math.nan, math.inf, -math.inf):
        for place in range(3):
            tensor = torch.zeros(3, dtype=torch.bfloat16)
            tensor[place] = bad
            assert not all_finite([torch.zeros(2, 2), tensor])


def test_the_plain_engine_says_when_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(EngineError, match=r"No space left on device.*save again"):
        plain().save(tmp_path)


def test_the_fused_optimizer_computes_the_same() -> None:
    one, other = plain(optimizer="adamw"), plain(optimizer="fused_adamw")
    assert train(one, 0, range(3)) == pytest.approx(train(other, 0, range(3)), rel=1e-5)
    for name, tensor in one.consolidated_state_dict().items():
        torch.testing.assert_close(other.consolidated_state_dict()[name], tensor, atol=1e-6, rtol=1e-6)


def test_the_8_bit_optimizer_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"adamw_8bit needs a GPU.*set optimizer: adamw"):
        plain(optimizer="adamw_8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    module = tiny()
    with pytest.raises(EngineError, match=r"needs the package bitsandbytes.*pip install bitsandbytes"):
        adamw(groups(module), EngineConfig(optimizer="adamw_8bit"), torch.device("cuda"))


def test_bf16_is_refused_on_a_gpu_that_only_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(EngineError, match=r"bf16 needs a GPU.*Tesla T4 is not one; set precision: fp32"):
        require_precision(EngineConfig(precision="bf16"), torch.device("cuda"))
    require_precision(EngineConfig(precision="bf16"), torch.device("cpu"))
    require_precision(EngineConfig(precision="fp32"), torch.device("cuda"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"backend": "plain", "offload_optimizer": "cpu"}, "offload_optimizer needs backend: deepspeed"),
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer needs zero_stage 1, 2 or 3"),
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "offload_parameters needs zero_stage 3 (it is 2)"),
        ({"zero_stage": 2, "offload_optimizer": "nvme"}, "offload_optimizer: nvme needs zero_stage 3"),
        ({"zero_stage": 3, "offload_optimizer": "nvme"}, "offload_optimizer: nvme needs nvme_path"),
        ({"zero_stage": 3, "offload_parameters": "nvme"}, "offload_parameters: nvme needs nvme_path"),
        ({"nvme_path": "/tmp"}, "nvme_path is set but nothing is offloaded to nvme"),
        ({"optimizer": "adamw_8bit", "offload_optimizer": "cpu"}, "adamw_8bit works on the GPU"),
        ({"bf16_states": True}, "bf16_states needs precision: bf16 (it is fp32)"),
        (
            {"bf16_states": True, "precision": "bf16", "zero_stage": 0},
            "bf16_states needs zero_stage 1, 2 or 3",
        ),
        (
            {"bf16_states": True, "precision": "bf16", "backend": "plain"},
            "bf16_states needs backend: deepspeed",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        EngineConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.dist
def test_what_a_host_cannot_do_is_said_before_deepspeed_starts(tmp_path: Path) -> None:
    run_two(cases.refuse_what_the_host_lacks, str(tmp_path), tmp_path, world_size=1)


@pytest.mark.dist
def test_states_take_the_bytes_that_are_computed_for_them(tmp_path: Path) -> None:
    run_two(cases.compare_memory, "", tmp_path)
