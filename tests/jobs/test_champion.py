"""Checkpoints become logged models and versions once; the champion changes only for a significantly better one."""

import re
import shutil
from pathlib import Path

import pytest
from registered_runs import end_stage, forward, run_with_shards, save

from infra.config_io import ConfigError
from infra.ledger import Ledger
from infra.mlflow_models import MlflowModels
from infra.mlflow_tracker import MlflowRuns, TrackingError, sqlite_uri
from jobs.champion import (
    CHAMPION,
    LATEST_STAGE,
    VERDICT,
    crown,
    judge,
    register_run,
    show_champion,
)
from jobs.checkpoint_facts import read_facts
from jobs.tracking import RunTracking, open_mlflow


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def runs(store, request, tmp_path, monkeypatch):
    """An experiment of its own for each test; the registered model is named after it too."""
    monkeypatch.chdir(tmp_path)
    yield MlflowRuns(sqlite_uri(store), request.node.name, tmp_path / "artifacts")
    assert not (tmp_path / "mlflow.db").exists(), "MLflow was asked in the current folder"


@pytest.fixture
def run(tmp_path, request):
    found, _ = run_with_shards(tmp_path / "a")
    name_recipe(found, re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()))
    return found


def name_recipe(run, name):
    text = run.recipe_file.read_text()
    assert "name: small\n" in text
    run.recipe_file.write_text(text.replace("name: small\n", f"name: {name}\n", 1))


def ids(run, runs, *stages):
    return {number: forward(run, number, runs) for number in stages}


def version(run, runs, alias_or_number):
    return MlflowModels(runs.client).version(run.recipe().name, alias_or_number)


def models_by_step(runs):
    found = runs.client.search_logged_models([runs.experiment_id])
    assert len({model.tags["svitt.key"] for model in found}) == len(found)
    return {(int(model.tags["stage"]), int(model.tags["step"])): model for model in found}


def test_each_kept_checkpoint_is_one_logged_model_of_its_run_with_its_scores(run, runs):
    save(run, 1, 20)
    path = end_stage(run, 1, 40, 10, scored=[(20, 8)])
    run_ids = ids(run, runs, 1)
    for _ in range(2):
        register_run(run, runs, run_ids)
    models = models_by_step(runs)
    assert set(models) == {(1, 20), (1, 40)}
    model = models[1, 40]
    assert model.source_run_id == run_ids[1]
    assert str(model.status) == "READY"
    assert model.params["step"] == "40"
    facts = read_facts(path)
    assert model.tags["path"] == str(path)
    assert model.tags["manifest_sha256"] == facts.manifest_sha256
    assert model.tags["data_fingerprint"] == facts.data_fingerprint
    assert model.tags["recipe_hash"] == "feed"
    assert model.tags["parent"] == ""
    assert model.tags["commit"] == "c0ffee"
    linked = {metric.key: metric.value for metric in model.metrics}
    assert linked["eval/egomcq/intra_video_acc"] == 25.0
    on_the_way = {metric.key: metric.value for metric in models[1, 20].metrics}
    assert on_the_way["eval/egomcq/intra_video_acc"] == 20.0
    history = runs.client.get_metric_history(run_ids[1], "eval/egomcq/intra_video_acc")
    assert [(point.step, point.value) for point in history] == [(20, 20.0), (40, 25.0)], "no point twice"


def test_scores_are_linked_later_when_their_points_had_not_arrived(run, runs):
    end_stage(run, 1, 40, 10)
    run_id = runs.ensure(f"{run.run_id}-1", "stage 1")
    register_run(run, runs, {1: run_id})
    assert not models_by_step(runs)[1, 40].metrics
    register_run(run, runs, ids(run, runs, 1))
    assert models_by_step(runs)[1, 40].metrics


def test_a_checkpoint_that_retention_deleted_or_another_replaced_is_marked(run, runs):
    save(run, 1, 10)
    save(run, 1, 20)
    run_ids = {1: runs.ensure(f"{run.run_id}-1", "stage 1")}
    register_run(run, runs, run_ids)
    shutil.rmtree(run.checkpoints(1) / "step-00000010")
    shutil.rmtree(run.checkpoints(1) / "step-00000020")
    save(run, 1, 20, value=0.5)
    register_run(run, runs, run_ids)
    found = runs.client.search_logged_models([runs.experiment_id])
    assert sorted((int(m.tags["step"]), m.tags["files"]) for m in found) == [
        (10, "gone"),
        (20, "gone"),
        (20, "kept"),
    ]


def test_the_first_scored_checkpoint_is_champion_and_the_newest_stage_end_latest(run, runs):
    end_stage(run, 1, 40, 10)
    said = register_run(run, runs, ids(run, runs, 1))
    assert said == [
        f"version 1 of {run.recipe().name}: stage 1 (short), step 40",
        f"version 1 of {run.recipe().name} is champion: the first one scored: EgoMCQ intra 25.0 %",
    ]
    end_stage(run, 2, 20, 12)
    register_run(run, runs, ids(run, runs, 1, 2))
    assert version(run, runs, LATEST_STAGE).number == "2"
    assert version(run, runs, CHAMPION).number == "1"
    assert Path(version(run, runs, "2").tags["checkpoint"]).is_dir()


def test_two_more_right_answers_of_forty_are_luck_and_twenty_are_not(run, runs):
    end_stage(run, 1, 40, 10)
    end_stage(run, 2, 20, 12)
    register_run(run, runs, ids(run, runs, 1, 2))
    assert version(run, runs, CHAMPION).number == "1"
    verdict = version(run, runs, "2").tags[VERDICT]
    assert verdict.startswith("not champion: not significantly better: EgoMCQ intra +5.0 points")
    assert "40 questions, against the champion, stage 1 (short), step 40" in verdict


def test_a_significantly_better_one_takes_the_alias_and_a_worse_one_does_not(run, runs):
    end_stage(run, 1, 40, 10)
    end_stage(run, 2, 20, 30)
    register_run(run, runs, ids(run, runs, 1, 2))
    assert version(run, runs, CHAMPION).number == "2"
    assert version(run, runs, "2").tags[VERDICT].startswith("champion: EgoMCQ intra +50.0 points")


def test_a_significantly_worse_one_stays_behind(tmp_path):
    run, _ = run_with_shards(tmp_path)
    good, bad = read_facts(end_stage(run, 1, 40, 30)), read_facts(end_stage(run, 2, 20, 10))
    assert not judge(bad, good).moves
    assert judge(good, bad).moves


def test_other_questions_cannot_be_paired_and_leave_the_alias_with_the_reason(run, runs):
    end_stage(run, 1, 40, 10)
    end_stage(run, 2, 20, 40, first_id=100)
    register_run(run, runs, ids(run, runs, 1, 2))
    assert version(run, runs, CHAMPION).number == "1"
    verdict = version(run, runs, "2").tags[VERDICT]
    assert verdict.startswith("not champion: it cannot be held against the champion, stage 1 (short)")
    assert "is not the same in both" in verdict


def test_answers_of_another_step_are_not_taken_for_the_champions(run, runs):
    end_stage(run, 1, 40, 10)
    register_run(run, runs, ids(run, runs, 1))
    (run.stage_dir(1) / "answers.parquet").unlink()
    end_stage(run, 2, 20, 40)
    register_run(run, runs, ids(run, runs, 1, 2))
    assert version(run, runs, CHAMPION).number == "1"
    assert "there is no such file" in version(run, runs, "2").tags[VERDICT]


def test_a_scored_checkpoint_on_the_way_is_a_version_and_no_candidate(run, runs):
    save(run, 1, 20)
    end_stage(run, 1, 40, 10, scored=[(20, 30)])
    register_run(run, runs, ids(run, runs, 1))
    assert version(run, runs, "1").tags["step"] == "20"
    assert "answers were not kept" in version(run, runs, "1").tags[VERDICT]
    assert version(run, runs, CHAMPION).number == "2"


def test_a_move_by_hand_keeps_its_reason_and_a_fresh_mlflow_ends_with_the_same_champion(run, runs, tmp_path):
    end_stage(run, 1, 40, 30)
    end_stage(run, 2, 20, 10)
    run_ids = ids(run, runs, 1, 2)
    register_run(run, runs, run_ids)
    crown(run, 2, "it is shown on Friday")
    for _ in range(2):
        register_run(run, runs, run_ids)
    assert version(run, runs, CHAMPION).number == "2"
    assert version(run, runs, "2").tags[VERDICT] == "champion: by hand: it is shown on Friday"
    fresh = MlflowRuns(sqlite_uri(tmp_path / "fresh.db"), "again", tmp_path / "artifacts")
    register_run(run, fresh, ids(run, fresh, 1, 2))
    assert version(run, fresh, CHAMPION).tags["step"] == "20"
    crown(run, 1, "back")
    register_run(run, runs, run_ids)
    assert version(run, runs, CHAMPION).number == "1"


def test_only_a_finished_stage_can_be_champion(run):
    end_stage(run, 1, 40, 30)
    with pytest.raises(ConfigError, match="stage 2 is pending"):
        crown(run, 2, "why not")


def test_runs_of_one_recipe_compete_for_one_champion(run, runs, tmp_path):
    end_stage(run, 1, 40, 10)
    register_run(run, runs, ids(run, runs, 1))
    other, _ = run_with_shards(tmp_path / "b")
    name_recipe(other, run.recipe().name)
    end_stage(other, 1, 40, 30)
    register_run(other, runs, ids(other, runs, 1))
    assert version(run, runs, CHAMPION).tags["checkpoint"].startswith(str(other.path))


class FailingClient:
    """The real one, but every different call fails the first time it is made, before or after it was carried out."""

    def __init__(self, client, after):
        self._client, self._after, self.failed = client, after, set()

    def __getattr__(self, name):
        found = getattr(self._client, name)

        def call(*args, **kwargs):
            asked = (name, repr(args), repr(kwargs))
            if asked in self.failed:
                return found(*args, **kwargs)
            self.failed.add(asked)
            if not self._after:
                raise ConnectionError("refused")
            found(*args, **kwargs)
            raise TimeoutError("no answer")

        return call


@pytest.mark.parametrize("after", [False, True])
def test_a_failure_of_any_call_is_made_good_by_the_next_pass(run, runs, after):
    save(run, 1, 20)
    end_stage(run, 1, 40, 10, scored=[(20, 8)])
    end_stage(run, 2, 20, 30)
    run_ids, real = ids(run, runs, 1, 2), runs.client
    runs.client = FailingClient(real, after)
    num_passes, has_failed = 0, True
    while has_failed:
        num_passes += 1
        try:
            register_run(run, runs, run_ids)
            has_failed = False
        except TrackingError:
            has_failed = True
    assert num_passes > 30
    written = {name for name, *_ in runs.client.failed}
    assert {
        "create_logged_model",
        "create_model_version",
        "set_registered_model_alias",
        "log_batch",
    } <= written
    runs.client = real
    assert set(models_by_step(runs)) == {(1, 20), (1, 40), (2, 20)}
    found = real.search_model_versions(f"name = '{run.recipe().name}'")
    assert sorted((int(v.version), v.tags["step"]) for v in found) == [(1, "20"), (2, "40"), (3, "20")]
    assert version(run, runs, CHAMPION).number == "3"
    assert version(run, runs, LATEST_STAGE).number == "3"
    history = real.get_metric_history(run_ids[1], "eval/egomcq/intra_video_acc")
    assert [(point.step, point.value) for point in history] == [(20, 20.0), (40, 25.0)]


def test_a_damaged_checkpoint_is_told_and_passed_over(run, runs, caplog):
    (save(run, 1, 20) / "manifest.json").write_text("{")
    end_stage(run, 1, 40, 10)
    register_run(run, runs, ids(run, runs, 1))
    assert set(models_by_step(runs)) == {(1, 40)}
    assert "it is not told to MLflow" in caplog.text


def test_weights_are_uploaded_once_where_asked_for(run, runs, tmp_path):
    text = run.recipe_file.read_text()
    run.recipe_file.write_text(text.replace("upload_weights: false", "upload_weights: true"))
    path = end_stage(run, 1, 40, 10)
    run_ids = ids(run, runs, 1)
    register_run(run, runs, run_ids)
    place = Path(models_by_step(runs)[1, 40].tags["uploaded"].removeprefix("file://"))
    assert sorted(p.name for p in place.iterdir()) == ["manifest.json", "model.json", "model.safetensors"]
    assert (place / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    (place / "model.json").unlink()
    register_run(run, runs, run_ids)
    assert not (place / "model.json").exists()


def test_the_end_of_a_stage_tells_mlflow_of_its_checkpoints(run, monkeypatch, tmp_path, store):
    text = run.recipe_file.read_text()
    run.recipe_file.write_text(text.replace("uri: null", f"uri: {sqlite_uri(store)}"))
    recipe = run.recipe()
    with RunTracking(run, recipe, Ledger(run.ledger_file)) as tracking:
        tracking.follow_stage(1)
        end_stage(run, 1, 40, 10)
        tracking.finish_stage(1, "done")
    found = MlflowModels(open_mlflow(recipe).client).version(recipe.name, CHAMPION)
    assert found is not None
    assert found.tags["step"] == "40"
    assert (
        "eval/egomcq/intra_video_acc" in MlflowModels(open_mlflow(recipe).client).get(found.model_id).scored
    )


def test_the_verb_says_who_is_champion_and_moves_it_with_a_reason(run, runs, report_lines, store):
    text = run.recipe_file.read_text()
    text = text.replace("uri: null", f"uri: {sqlite_uri(store)}")
    run.recipe_file.write_text(text.replace("experiment: svitt-ego", "experiment: by-verb"))
    report, lines = report_lines
    with pytest.raises(ConfigError, match="no stage is done yet"):
        show_champion(run, None, None, report)
    end_stage(run, 1, 40, 30)
    end_stage(run, 2, 20, 10)
    with pytest.raises(TrackingError, match="MLflow has no run of stage 2"):
        show_champion(run, None, None, report)
    opened = open_mlflow(run.recipe())
    for number in (1, 2):
        forward(run, number, opened)
    assert show_champion(run, None, None, report) == 0
    assert lines()[-1].startswith(f"champion of {run.recipe().name}: version 1, ")
    assert show_champion(run, None, "a demonstration", report) == 0
    assert lines()[-1].startswith(f"champion of {run.recipe().name}: version 2, ")
    assert lines()[-2] == f"version 2 of {run.recipe().name} is champion: by hand: a demonstration"
