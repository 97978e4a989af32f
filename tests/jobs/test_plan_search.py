"""The search for settings that fit, on traces made up by hand."""

from typing import Any

import pytest
import torch

from infra.config import EngineConfig
from jobs.memory_plan import engine_memory, predict
from jobs.plan_search import Plan, PlanError, Planner, Recompute, Settings, Wish, Workload, candidates, search
from jobs.step_memory import StepBytes, StepTrace
from model.config import ModelConfig

MODEL = ModelConfig.named("tiny")
PLAIN = EngineConfig(backend="plain")
MIB = 2**20
ENGINE = engine_memory(MODEL, PLAIN, 1)
# What lies above the engine's parameters and states.
ROOM = ENGINE.resident


def trace(model: ModelConfig, dtype: torch.dtype, clips: int, size: int, *_: Any) -> StepTrace:
    """10 MiB of activations for each clip, 4 where layers are recomputed, and 3 of gradients from the first on."""
    each = 10 if model.video.recompute == "none" else 4
    step = StepBytes(each * size * MIB, 0, 3 * MIB)
    return StepTrace(step, step, 0)


def work(clips: int = 16, name: str = "short") -> Workload:
    return Workload(name, MODEL, clips, 1, 12, (2, 3))


def test_the_prediction_is_the_worst_moment_of_a_step() -> None:
    step = StepBytes(activations=5, logits=3, gradients=2)
    alone = StepBytes(activations=6, logits=3, gradients=1)
    engine = ENGINE._replace(
        parameters=10,
        optimizer=20,
        buffers=1,
        gathered=2,
        reduction=4,
        update=5,
        host=7,
        partial_gradients=None,
    )
    found = predict(StepTrace(step, alone, 9), engine)
    assert found == ("backward", 10, 20, 2, 5, 3, 3, 16)
    assert found.total == 43
    # Where each call reduces its gradients, the engine's own count takes the place of whole ones.
    assert (
        predict(StepTrace(step, alone, 0), engine._replace(partial_gradients=4)).total == 10 + 20 + 4 + 9 + 3
    )
    assert predict(StepTrace(step, alone, 0), engine._replace(update=20)) == (
        "update",
        10,
        20,
        0,
        0,
        0,
        21,
        7,
    )
    assert predict(StepTrace(step, alone, 0), engine._replace(reduction=30))[:4] == ("reduction", 10, 20, 30)
    # A GPU's matrix products work in 32 MiB that stay, and in 64 more while there are any.
    assert predict(StepTrace(step, alone, 0), engine, on_gpu=True).total == 43 + 96 * MIB
    update = predict(StepTrace(step, alone, 0), engine._replace(update=100 * MIB), on_gpu=True)
    assert (update.moment, update.total) == ("update", 10 + 20 + 1 + 132 * MIB)


def test_the_largest_micro_batch_that_fits_is_found_to_the_clip() -> None:
    planner, settings = Planner(trace), Settings(PLAIN, Recompute())
    choice = planner.largest(work(), settings, ROOM + 43 * MIB)
    assert choice is not None
    assert (choice.micro_batch_size, choice.prediction.total) == (4, ROOM + 43 * MIB)
    assert planner.largest(work(), settings, ROOM + 43 * MIB - 1).micro_batch_size == 3  # type: ignore[union-attr]
    assert planner.largest(work(), settings, ROOM + 2**40).micro_batch_size == 16  # type: ignore[union-attr]
    assert planner.largest(work(), settings, ROOM + 13 * MIB - 1) is None


def test_what_the_straight_line_misses_is_corrected() -> None:
    def bent(model: ModelConfig, dtype: torch.dtype, clips: int, size: int, *_: Any) -> StepTrace:
        step = StepBytes((10 * size + (3 if size > 2 else 0)) * MIB, 0, 0)
        return StepTrace(step, step, 0)

    planner, memory_bytes = Planner(bent), ROOM + 42 * MIB
    choice = planner.largest(work(), Settings(PLAIN, Recompute()), memory_bytes)
    assert choice is not None
    assert choice.micro_batch_size == 4
    assert planner.proven(work(), choice, memory_bytes).micro_batch_size == 3


def test_recomputation_is_taken_only_where_it_is_needed() -> None:
    both = [Settings(PLAIN, Recompute("all")), Settings(PLAIN, Recompute())]
    roomy = search([work()], both, ROOM + 163 * MIB, 0, Planner(trace))
    assert isinstance(roomy, Plan)
    assert roomy.choices[0].settings.recompute == Recompute()
    assert roomy.wish is None
    tight = search([work()], both, ROOM + 12 * MIB, 0, Planner(trace))
    assert isinstance(tight, Plan)
    assert (tight.choices[0].settings.recompute.video, tight.choices[0].micro_batch_size) == ("all", 2)
    # One clip without recomputing takes 13 MiB, three with it 15: the nearest that misses.
    assert tight.wish == Wish(Settings(PLAIN, Recompute()), "short", 1, MIB)


def test_all_stages_share_the_settings_and_each_has_its_micro_batch() -> None:
    plan = search(
        [work(8), work(2, "long")], [Settings(PLAIN, Recompute())], ROOM + 53 * MIB, 0, Planner(trace)
    )
    assert isinstance(plan, Plan)
    assert [choice.micro_batch_size for choice in plan.choices] == [5, 2]


def test_where_nothing_fits_the_smallest_miss_is_told() -> None:
    both = [Settings(PLAIN, Recompute()), Settings(PLAIN, Recompute("all"))]
    found = search([work()], both, ROOM + 5 * MIB, 0, Planner(trace))
    assert found == Wish(both[1], "short", 1, 2 * MIB)


def test_settings_that_offload_more_than_the_host_has_are_left_out() -> None:
    offloading = Settings(EngineConfig(zero_stage=2, offload_optimizer="cpu"), Recompute())
    with pytest.raises(PlanError, match="host memory"):
        search([work()], [offloading], 2**40, 1000, Planner(trace))


def test_activations_on_the_host_count_there_too() -> None:
    def offloading(*_: Any) -> StepTrace:
        return trace(*_)._replace(host=1001)

    with pytest.raises(PlanError, match="host memory"):
        search([work()], [Settings(PLAIN, Recompute())], 2**40, 1000, Planner(offloading))
    assert isinstance(
        search([work()], [Settings(PLAIN, Recompute())], 2**40, 1001, Planner(offloading)), Plan
    )


def test_candidates_keep_what_changes_the_numbers() -> None:
    engine = EngineConfig(precision="bf16", weight_decay=0.1, gradient_clipping=2.0, zero_stage=1)
    found = list(candidates(engine, MODEL, 2, has_kernel=True))
    assert len(set(found)) == len(found)
    assert {c.engine.precision for c in found} == {"bf16"}
    assert {c.engine.weight_decay for c in found} == {0.1}
    assert {c.engine.gradient_clipping for c in found} == {2.0}
    assert {(c.engine.zero_stage, c.engine.offload_optimizer) for c in found} >= {
        (1, "none"),
        (3, "none"),
        (2, "cpu"),
    }
    # With one rank there is nothing to shard.
    alone = list(candidates(engine, MODEL, 1, has_kernel=False))
    assert {c.engine.zero_stage for c in alone if c.engine.offload_optimizer == "none"} == {1}
    assert "all_but_attention" not in {c.recompute.video for c in alone}


def test_traces_made_side_by_side_are_those_made_one_by_one() -> None:
    loads = [work(4), work(1, "long")]
    settings = [Settings(PLAIN, Recompute()), Settings(EngineConfig(zero_stage=1), Recompute())]
    planner = Planner(trace)
    # One and two clips of the first stage, one of the second: the engine makes no difference.
    assert list(planner.prepare(loads, settings, num_processes=2)) == [2, 1, 0]
    planner._trace = _fail
    assert planner.predict(loads[0], settings[0], 2).activations == 20 * MIB
    assert planner.predict(loads[0], settings[1], 2).total > 0
    assert planner.predict(loads[1], settings[0], 1).activations == 10 * MIB


def _fail(*_: Any) -> StepTrace:
    raise AssertionError("traced again")
