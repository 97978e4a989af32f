"""From an alias back to the data, and what is said when something on the way is gone."""

import json
import shutil

import pytest
from registered_runs import end_stage, forward, run_with_shards

from infra.mlflow_tracker import MlflowRuns, TrackingError, sqlite_uri
from jobs.champion import register_run
from jobs.lineage import LineageError, lineage, lineage_json, lineage_lines, show_lineage


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A workspace with a run of two stages and its MLflow: stage 2 is champion."""
    workspace = tmp_path_factory.mktemp("lineage") / "workspace"
    run, fingerprint = run_with_shards(workspace)
    end_stage(run, 1, 40, 10)
    end_stage(run, 2, 20, 30)
    runs = MlflowRuns(sqlite_uri(workspace / "mlflow.db"), "svitt-ego", workspace / "artifacts")
    register_run(run, runs, {number: forward(run, number, runs) for number in (1, 2)})
    return run, fingerprint, workspace


@pytest.fixture
def world(original, monkeypatch, tmp_path):
    """The same, its files put back afterwards whatever a test takes away; the current folder is an empty one."""
    run, fingerprint, workspace = original
    kept = tmp_path / "kept"
    for name in ("runs", "shards"):
        shutil.copytree(workspace / name, kept / name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    yield run, fingerprint, workspace
    for name in ("runs", "shards"):
        shutil.rmtree(workspace / name)
        shutil.copytree(kept / name, workspace / name)


def test_the_champion_leads_to_its_parent_and_both_to_the_data(world):
    run, fingerprint, workspace = world
    found = lineage("champion", workspace)
    assert found.version.number == "2"
    assert [(facts.stage, facts.step) for facts in found.checkpoints] == [(2, 20), (1, 40)]
    assert found.checkpoints[0].parent == found.checkpoints[1].path
    assert found.checkpoints[1].parent == ""
    assert {facts.data_fingerprint for facts in found.checkpoints} == {fingerprint}
    assert found.broken == ()
    lines = lineage_lines(found)
    assert lines[0] == "small version 2 (champion, latest-stage)"
    assert lines[1].startswith("  champion: EgoMCQ intra +50.0 points")
    assert lines[2] == "stage 2 (long), step 20, of run small"
    assert lines[3].startswith(f"  checkpoint {run.checkpoints(2) / 'step-00000020'}, manifest ")
    assert "  code c0ffee; torch 2.13.0" in lines
    assert "  EgoMCQ intra 75.0 [65.0, 85.0] (n 40)" in lines
    assert lines[-1].startswith(f"data {fingerprint[:16]}: ")
    assert lines[-1].endswith(f" clips in {run.recipe().data.shards}")


@pytest.mark.parametrize("how", ["version", "alias", "run", "checkpoint"])
def test_all_ways_to_name_it_lead_to_the_same_checkpoints(world, how):
    run, _, workspace = world
    target = {
        "version": "2",
        "alias": "latest-stage",
        "run": str(run.path),
        "checkpoint": str(run.checkpoints(2) / "step-00000020"),
    }[how]
    assert lineage(target, workspace).checkpoints == lineage("champion", workspace).checkpoints


def test_it_is_printed_for_programs_too(world, report_lines):
    _, fingerprint, workspace = world
    report, lines = report_lines
    assert show_lineage("champion", workspace, None, None, report, as_json=True) == 0
    found = json.loads("\n".join(lines()))
    assert found["version"]["aliases"] == ["champion", "latest-stage"]
    assert [facts["data_fingerprint"] for facts in found["checkpoints"]] == [fingerprint] * 2
    assert found["checkpoints"][0]["scores"]["eval/egomcq/intra_video_acc"] == 75.0
    assert found["broken"] == []


def test_a_parent_that_is_gone_is_told_from_mlflow_and_said(world, report_lines):
    run, _, workspace = world
    before = lineage("champion", workspace)
    shutil.rmtree(run.checkpoints(1))
    found = lineage("champion", workspace)
    assert found.checkpoints == before.checkpoints
    assert [problem for problem in found.broken if "step-00000040/manifest.json is missing" in problem]
    report, lines = report_lines
    assert show_lineage("champion", workspace, None, None, report, as_json=False) == 1
    assert lines()[-1].startswith("broken: ")


def test_a_run_directory_that_is_gone_is_told_whole_from_mlflow(world):
    run, _, workspace = world
    before = lineage("champion", workspace)
    shutil.rmtree(run.path)
    found = lineage("champion", workspace)
    assert found.checkpoints == before.checkpoints
    assert len(found.broken) == 1
    assert "this is no run directory" in found.broken[0]


def test_files_and_mlflow_gone_end_the_chain_where_it_is_broken(world, tmp_path):
    run, _, workspace = world
    shutil.rmtree(run.checkpoints(1))
    found = lineage(str(run.path), workspace, uri=sqlite_uri(tmp_path / "gone.db"))
    assert [facts.stage for facts in found.checkpoints] == [2]
    assert any("MLflow could not be asked" in problem for problem in found.broken)


def test_another_checkpoint_in_its_place_is_said(world):
    run, _, workspace = world
    before = lineage("champion", workspace)
    path = run.checkpoints(2) / "step-00000020" / "manifest.json"
    path.write_text(path.read_text().replace('"feed"', '"food"'))
    found = lineage("champion", workspace)
    assert found.checkpoints == before.checkpoints
    assert "another checkpoint has taken its place" in found.broken[0]


def test_shards_that_hold_other_data_by_now_are_said(world):
    run, fingerprint, workspace = world
    path = workspace / "shards" / "train" / "manifest.json"
    path.write_text(path.read_text().replace(fingerprint, "0" * len(fingerprint)))
    found = lineage("champion", workspace)
    assert [facts.num_clips for facts in found.checkpoints] == [None, None]
    assert found.broken == (f"{run.recipe().data.shards}: not there, or other data than {fingerprint[:16]}",)
    assert "unknown how many clips" in lineage_lines(found)[-2]


def test_what_is_not_there_is_an_error_that_says_what_to_give(world, tmp_path):
    _, _, workspace = world
    with pytest.raises(LineageError, match=r"'best': small has no such alias or version"):
        lineage("best", workspace)
    with pytest.raises(TrackingError, match=r"there is no such file; give the workspace"):
        lineage("champion", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_among_several_registered_models_one_has_to_be_named(world):
    _, _, workspace = world
    runs = MlflowRuns(sqlite_uri(workspace / "mlflow.db"), "svitt-ego", workspace / "artifacts")
    runs.client.create_registered_model("other")
    try:
        with pytest.raises(
            LineageError, match=r"2 registered models \(other, small\); name one with --model"
        ):
            lineage("champion", workspace)
        found = lineage_json(lineage("champion", workspace, model="small"))
        assert (found["version"]["name"], found["version"]["number"]) == ("small", "2")
    finally:
        runs.client.delete_registered_model("other")
