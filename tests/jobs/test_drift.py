"""Every key of a recipe has a class, and the class follows how far the run has come."""

from pathlib import Path

import pytest

from infra.ledger import Ledger, RunState
from jobs.drift import CLASSES, STAGE_CLASSES, LostHistoryError, class_of, find_drift, flat, require_history
from jobs.recipe import Recipe, StageConfig, load_recipe, resolve_paths
from jobs.run_dir import RunDir


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return resolve_paths(load_recipe("demo"), tmp_path)


def test_every_key_of_a_recipe_has_a_class(recipe: Recipe) -> None:
    for key in flat(recipe.model_dump(mode="json")):
        assert class_of(key, RunState(), 2) in ("free", "warned", "refused"), key
        part = key.split(".")[0]
        by_name = key in CLASSES or part == "stages"
        assert by_name or CLASSES[part] == "refused" or part in ("world", "clips", "prepare"), key
    assert set(STAGE_CLASSES) == set(StageConfig.model_fields)


def test_no_class_is_left_for_a_key_that_is_gone(recipe: Recipe) -> None:
    keys = flat(recipe.model_dump(mode="json"))
    for prefix in CLASSES:
        assert any(key == prefix or key.startswith(f"{prefix}.") for key in keys), prefix


@pytest.mark.parametrize(
    ("status", "is_started", "expected"),
    [("pending", False, "warned"), ("running", True, "refused"), ("done", True, "refused")],
)
def test_a_stage_is_free_to_change_until_it_has_begun(
    status: str, is_started: bool, expected: str, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    if is_started:
        ledger.record_start(2, 1)
    ledger.record_stage(2, status)  # type: ignore[arg-type]
    state = ledger.read()
    assert class_of("stages.1.keep_rate", state, 3) == expected
    assert class_of("stages.1.learning_rate", state, 3) == ("refused" if status == "done" else "warned")
    assert class_of("stages.2.keep_rate", state, 3) == "warned"


def test_the_longest_key_decides() -> None:
    assert class_of("cluster.num_workers", RunState(), 2) == "warned"
    assert class_of("cluster.max_failures", RunState(), 2) == "free"
    assert class_of("model.video.width", RunState(), 2) == "refused"
    assert class_of("model.video.recompute", RunState(), 2) == "free"


def test_one_stage_more_and_a_shorter_list_are_told_key_by_key(recipe: Recipe) -> None:
    shorter = recipe.model_copy(update={"stages": recipe.stages[:1]})
    keys = [drift.key for drift in find_drift(shorter, recipe, RunState())]
    assert "stages.1.name" in keys
    other = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"betas": (0.9, 0.5)})})
    (drift,) = find_drift(recipe, other, RunState())
    assert (drift.key, drift.old, drift.new) == ("engine.betas", "[0.9, 0.98]", "[0.9, 0.5]")


def test_stages_are_added_but_neither_taken_away_nor_moved(recipe: Recipe) -> None:
    first, second = recipe.stages
    third = second.model_copy(update={"name": "third"})

    def refused(*stages: StageConfig) -> list[str]:
        found = find_drift(recipe, recipe.model_copy(update={"stages": stages}), RunState())
        assert found
        return [drift.key for drift in found if drift.kind == "refused"]

    assert refused(first, second, third) == []
    assert refused(first) == ["stages.1.name"]
    assert refused(second, first) == ["stages.0.name", "stages.1.name"]


def test_a_stage_with_history_does_not_start_from_zero_by_itself(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    ledger = Ledger(run.ledger_file)
    require_history(ledger.read(), 1, run)
    ledger.record_attempt(1, "job")
    require_history(ledger.read(), 1, run)
    ledger.record_stage(1, "running", step=40, checkpoint="step-00000040")
    with pytest.raises(LostHistoryError, match=r"trained to step 40.*none of the checkpoints.*--fresh"):
        require_history(ledger.read(), 1, run)
