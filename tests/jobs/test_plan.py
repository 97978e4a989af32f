"""`svitt plan` on a recipe of two stages, with traces made up by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import OVERRIDES

from infra.config_io import ConfigError
from jobs import __main__ as command_line
from jobs import plan as module
from jobs.memory_plan import engine_memory
from jobs.plan import Wanted, own_settings, run_plan, workload
from jobs.plan_search import PlanError, Planner, usable_bytes
from jobs.progress import ProgressReport
from jobs.recipe import Recipe, load_recipe, load_recipe_tree, resolve_paths
from jobs.step_memory import StepBytes, StepTrace
from model.config import ModelConfig

MIB = 2**20
Report = tuple[ProgressReport, Callable[[], list[str]]]


def trace(model: ModelConfig, dtype: Any, clips: int, size: int, *_: Any) -> StepTrace:
    """10 MiB for each clip and frame, a quarter where layers are recomputed."""
    each = 10.0 if model.video.recompute == "none" else 2.5
    step = StepBytes(int(each * model.video.num_frames * size * MIB), 0, 0)
    return StepTrace(step, step, 0)


@pytest.fixture(autouse=True)
def _traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Planner", lambda: Planner(trace))
    monkeypatch.setattr(
        module, "trace_ahead", lambda *_: None
    )  # its processes would not know the made-up traces


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return resolve_paths(load_recipe("demo", (*OVERRIDES, *overrides)), folder)


def resident(recipe: Recipe) -> int:
    """Of the larger stage on two ranks at ZeRO 1."""
    engine = recipe.engine.model_copy(update={"zero_stage": 1})
    return engine_memory(recipe.stage_model(recipe.stages[1]), engine, 2).resident


def test_a_plan_is_printed_and_written_as_a_recipe_that_says_the_same(
    tmp_path: Path, report_lines: Report
) -> None:
    report, lines = report_lines
    recipe = recipe_of(tmp_path)
    wanted = Wanted(resident(recipe) + 25 * MIB, num_devices=2)
    written = tmp_path / "fits.yaml"
    tree = load_recipe_tree("demo", OVERRIDES)
    assert run_plan(recipe, tree, wanted, written, report) == 0
    again = load_recipe(str(written))
    settings, planner = own_settings(again), Planner(trace)
    for stage in again.stages:
        load, size = workload(again, stage, 2), stage.micro_batch_size or stage.clips_per_rank(2)
        assert planner.predict(load, settings, size).total <= usable_bytes(wanted.memory_bytes)
        if size < load.clips_per_rank:
            assert planner.predict(load, settings, size + 1).total > usable_bytes(wanted.memory_bytes)
    said = "\n".join(lines())
    assert "The recipe as it is" in said
    assert "The fastest settings that fit" in said
    assert "Nearest that does not fit: stage" in said
    for number, stage in enumerate(again.stages):
        if stage.micro_batch_size is not None:
            assert f"--set stages.{number}.micro_batch_size={stage.micro_batch_size}" in said


def test_where_nothing_fits_the_answer_is_how_much_is_missing(tmp_path: Path, report_lines: Report) -> None:
    report, lines = report_lines
    recipe = recipe_of(tmp_path)
    assert run_plan(recipe, {}, Wanted(MIB, 2), None, report) == 1
    assert "Nothing fits" in lines()[-1]
    assert "at one clip at a time" in lines()[-1]


def test_devices_that_do_not_divide_the_batch_are_refused(tmp_path: Path, report_lines: Report) -> None:
    with pytest.raises(PlanError, match=r"stage short: global_batch_size 8 does not divide by 3 devices"):
        run_plan(recipe_of(tmp_path), {}, Wanted(2**30, 3), None, report_lines[0])
    with pytest.raises(PlanError, match="at least one"):
        run_plan(recipe_of(tmp_path), {}, Wanted(2**30, 0), None, report_lines[0])


def test_a_plan_needs_an_amount_of_memory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--memory, as 8GiB"):
        command_line.plan("demo", tmp_path)
    with pytest.raises(ConfigError, match="no amount of memory"):
        command_line.plan("demo", tmp_path, memory="8 gigs")
    with pytest.raises(ConfigError, match="no amount of memory"):
        command_line.plan("demo", tmp_path, ("cluster.device_memory=lots",))
