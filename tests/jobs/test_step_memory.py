"""Predicted memory of a step against a child process that takes the step with a counting allocator."""

import importlib.util

import pytest
import torch

from infra.config import EngineConfig
from infra.engine import torch_dtype
from jobs.memory_plan import Prediction, engine_memory, predict
from jobs.memory_probe import ProbeError, ProbeRequest, ShortageError, probe
from jobs.step_memory import trace_step
from model.config import ModelConfig
from tests.jobs.gradient_cases import model as gradient_model

CLIPS, LENGTH, TAGS = 12, 8, (5, 7)
MODEL = gradient_model().config


def request(engine: EngineConfig, size: int, ranks: int = 1, model: ModelConfig = MODEL) -> ProbeRequest:
    return ProbeRequest(
        model=model,
        engine=engine,
        world_size=ranks,
        clips_per_rank=CLIPS,
        micro_batch_size=size,
        text_length=LENGTH,
        num_tags=TAGS,
    )


def prediction(asked: ProbeRequest) -> Prediction:
    dtype = torch_dtype(asked.engine)
    trace = trace_step(asked.model, dtype, CLIPS, asked.micro_batch_size, LENGTH, TAGS, asked.world_size)
    return predict(trace, engine_memory(asked.model, asked.engine, asked.world_size))


def test_one_rank_takes_what_was_predicted_and_one_clip_more_does_not_fit() -> None:
    engine = EngineConfig(backend="plain")
    fits, larger = (prediction(request(engine, size)).total for size in (4, 5))
    limit = (fits + larger) // 2
    found = probe(request(engine, 4).model_copy(update={"limit_bytes": limit}))
    assert abs(fits / found.peak_bytes - 1) < 0.01
    assert found.host_bytes == 0
    with pytest.raises(ShortageError, match="memory budget of the CPU device"):
        probe(request(engine, 5).model_copy(update={"limit_bytes": limit}))


def test_ranks_that_share_gradients_take_what_was_predicted() -> None:
    engine = EngineConfig(zero_stage=2, gradient_reduction="backward", bucket_bytes=2**18)
    asked = request(engine, 4, ranks=2)
    assert abs(prediction(asked).total / probe(asked).peak_bytes - 1) < 0.08


def test_ranks_that_share_parameters_do_too() -> None:
    # A fixed temperature and a projection that is large enough to be shared: ZeRO 3 once failed at its second step.
    model = MODEL.replaced(learn_temperature=False, joint_width=128)
    asked = request(EngineConfig(zero_stage=3, bucket_bytes=2**18), 4, ranks=2, model=model)
    assert abs(prediction(asked).total / probe(asked).peak_bytes - 1) < 0.08


def test_a_batch_64_times_as_large_takes_less_than_5_percent_more() -> None:
    few, many = (
        ProbeRequest(
            model=ModelConfig.named("tiny"),
            engine=EngineConfig(backend="plain"),
            world_size=1,
            clips_per_rank=clips,
            micro_batch_size=8,
            text_length=32,
            num_tags=(118, 582),
        )
        for clips in (64, 4096)
    )
    assert probe(many).peak_bytes < 1.05 * probe(few).peak_bytes


def test_layers_that_recompute_or_offload_need_less_and_the_host_more() -> None:
    engine = EngineConfig(backend="plain")
    kept = [prediction(request(engine, 4))]
    for offload in (False, True):
        part = {"recompute": "all", "offload_activations": offload}
        kept.append(prediction(request(engine, 4, model=MODEL.replaced(video=part, text=part))))
    assert kept[0].activations > kept[1].activations > kept[2].activations
    assert [p.host > 0 for p in kept] == [False, False, True]
    assert len({p.parameters + p.optimizer for p in kept}) == 1


def test_a_prediction_allocates_nothing_and_leaves_torch_as_it_was() -> None:
    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    base = ModelConfig.named("tiny")
    trace = trace_step(base, torch.bfloat16, 4096, 512, LENGTH, TAGS)
    assert trace.with_gradients.total > 2**30
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert isinstance(torch.zeros(2), torch.Tensor)
    assert torch.zeros(2).tolist() == [0, 0]


def test_another_failure_of_a_rank_is_told_with_its_last_words() -> None:
    with pytest.raises(ProbeError, match=r"rank 0 ended with 1 .*(?s:.*)adamw_8bit needs a GPU"):
        probe(request(EngineConfig(zero_stage=1, optimizer="adamw_8bit"), 4))


def test_a_step_of_a_gpu_can_be_traced_with_every_backend_it_may_take() -> None:
    traces = [
        trace_step(
            MODEL.replaced(video={"attention_backend": backend}),
            torch.bfloat16,
            CLIPS,
            4,
            LENGTH,
            TAGS,
            on_gpu=True,
        )
        for backend in ("auto", "triton", "blocks")
    ]
    auto, triton, blocks = (trace.with_gradients.total for trace in traces)
    if importlib.util.find_spec("triton"):
        assert auto == triton < blocks
    else:
        assert auto == triton == blocks
    assert traces[0].with_gradients.total % 512 == 0
