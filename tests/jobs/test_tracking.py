"""What MLflow shows of a run stands in the run directory, and can be made again from there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import SCORES
from tracked_runs import Clock, dump_runs, play, tracked_run, train_stage

from infra.checkpoint_files import MANIFEST
from infra.config_io import ConfigError
from infra.journal import metric_history, read_journal
from infra.ledger import Ledger
from infra.mlflow_tracker import sqlite_uri
from jobs import tracking
from jobs.progress import ProgressReport
from jobs.rebuild import rebuild, rebuild_run
from jobs.run_dir import RunDir
from jobs.submit import put_aside
from jobs.summary import num_unsent
from jobs.tracking import RunTracking, fact_name, tracking_uri


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    played = tracked_run(tmp_path_factory.mktemp("tracked"))
    play(played, Clock())
    return played


def stage_of(dump: dict, number: int) -> dict:
    return next(run for run in dump.values() if run["tags"].get("stage", "").startswith(str(number)))


def test_runs_hold_what_the_journals_say(run: RunDir) -> None:
    dump = dump_runs(tracking_uri(run.recipe()))
    assert sorted(dump) == ["small", "small / 1 short", "small / 2 long"]
    assert num_unsent(Ledger(run.ledger_file).read()) == 0
    losses = [(step, value) for step, _, value in dump["small / 1 short"]["history"]["train/loss"]]
    assert losses == metric_history(run.journal(1), "train/loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6, 7, 8]
    second = [step for step, *_ in dump["small / 2 long"]["history"]["train/loss"]]
    assert second == [1, 2, 3], "what a resume would compute again waits"
    assert {name: run["status"] for name, run in dump.items()} == {
        "small": "FAILED",
        "small / 1 short": "FINISHED",
        "small / 2 long": "FAILED",
    }


def test_a_second_controller_tells_a_finished_stage_no_second_time(run: RunDir) -> None:
    history = dump_runs(tracking_uri(run.recipe()))["small"]["history"]
    assert [step for step, *_ in history["faults/crashes"]] == [1, 2]
    assert [(step, value) for step, _, value in history["eval/egomcq/inter_video_acc"]] == [
        (1, SCORES["eval/egomcq/inter_video_acc"])
    ]


def test_runs_begin_with_their_journals_and_end_as_the_ledger_tells(run: RunDir) -> None:
    dump, state = dump_runs(tracking_uri(run.recipe())), Ledger(run.ledger_file).read()
    assert dump["small"]["start_ms"] == 1_700_000_000_010, "the first look at the clock"
    for number, name in ((1, "small / 1 short"), (2, "small / 2 long")):
        assert dump[name]["start_ms"] == read_journal(run.journal(number))[0][0].time_ms
    assert dump["small / 1 short"]["end_ms"] == round(1e3 * state.stage(1).status_times_s["done"])
    assert dump["small / 2 long"]["end_ms"] == round(1e3 * state.stage(2).status_times_s["failed"])


def test_a_run_shows_its_recipe_its_data_and_the_checkpoint_it_started_from(run: RunDir) -> None:
    dump = dump_runs(tracking_uri(run.recipe()))
    assert dump["small"]["artifacts"] == [run.recipe_file.read_text()]
    (data, tags) = dump["small / 2 long"]["data"][0]
    assert json.loads(data["profile"]) == {"num_clips": 12}
    assert tags == [("mlflow.data.context", "training")]
    assert data["digest"] == dump["small"]["tags"]["data_fingerprint"][:36]
    second = dump["small / 2 long"]["tags"]
    assert second["parent_checkpoint"] == str(run.checkpoints(1) / "step-00000008")
    assert second["parent_checkpoint_sha256"].startswith("44136fa355b3678a")  # of {}
    assert "parent_checkpoint" not in dump["small / 1 short"]["tags"]
    assert second["device"] == "a processor"


def test_runs_rebuilt_in_a_fresh_store_are_the_same_field_by_field(
    run: RunDir, tmp_path: Path, report_lines: tuple[ProgressReport, Any]
) -> None:
    uri = sqlite_uri(tmp_path / "other.db")
    ledger_before = run.ledger_file.read_bytes()
    for _ in range(2):  # a second time changes nothing
        assert rebuild([run.path], uri, report_lines[0]) == 0
        assert dump_runs(uri) == dump_runs(tracking_uri(run.recipe()))
    assert run.ledger_file.read_bytes() == ledger_before


def test_a_lost_store_is_rebuilt_under_its_own_address(tmp_path: Path) -> None:
    run, clock = tracked_run(tmp_path), Clock()
    play(run, clock)
    before = dump_runs(tracking_uri(run.recipe()))
    ids_before = [Ledger(run.ledger_file).read().facts[fact_name(number)] for number in range(3)]
    (tmp_path / "mlflow.db").rename(tmp_path / "lost.db")
    # A process of its own: MLflow keeps connections to the file that is gone.
    command = [sys.executable, "-m", "jobs", "rebuild", str(run.path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "3 MLflow runs are whole" in " ".join(said.split())
    (tmp_path / "mlflow.db").rename(tmp_path / "found.db")
    assert dump_runs(sqlite_uri(tmp_path / "found.db")) == before
    ids = [Ledger(run.ledger_file).read().facts[fact_name(number)] for number in range(3)]
    assert len({*ids, *ids_before}) == 6, "the ledger has the new ones"


def test_a_server_that_was_away_to_the_end_is_completed_by_a_rebuild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracked_run(tmp_path)
    with monkeypatch.context() as away:
        away.setattr("infra.mlflow_forwarder.JournalCopy.send", lambda self: None)
        play(run, Clock())
    missing = num_unsent(Ledger(run.ledger_file).read())
    assert missing > 0
    rebuild_run(run, sqlite_uri(tmp_path / "other.db"))
    assert num_unsent(Ledger(run.ledger_file).read()) == missing, "the run's own MLflow still lacks them"
    rebuild_run(run)
    assert num_unsent(Ledger(run.ledger_file).read()) == 0
    dump = dump_runs(tracking_uri(run.recipe()))
    losses = [(step, value) for step, _, value in dump["small / 1 short"]["history"]["train/loss"]]
    assert losses == metric_history(run.journal(1), "train/loss")
    assert [dump[name]["status"] for name in sorted(dump)] == ["FAILED", "FINISHED", "FAILED"]


def test_a_run_started_afresh_in_the_same_folder_has_runs_of_its_own(tmp_path: Path) -> None:
    run, clock = tracked_run(tmp_path), Clock()
    recipe_text = run.recipe_file.read_text()
    play(run, clock)
    put_aside(run.path, lambda line: None)
    run.path.mkdir()
    run.recipe_file.write_text(recipe_text)
    ledger = Ledger(run.ledger_file, clock)
    with RunTracking(run, run.recipe(), ledger, clock) as tracked:
        tracked.follow_stage(1)
        ledger.record_attempt(1, "job-1")
        train_stage(run, ledger, 1, clock, range(2), save_at=2)
        ledger.record_stage(1, "stopped")
        tracked.finish_stage(1, "stopped")
        tracked.finish_run("stopped")
    client = tracking.open_mlflow(run.recipe()).client
    experiment = client.get_experiment_by_name("svitt-ego")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(found.info.status for found in runs) == ["FAILED", "FAILED", "FINISHED", "KILLED", "KILLED"]


def test_a_folder_that_no_controller_has_driven_cannot_be_rebuilt(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="describes no MLflow run"):
        rebuild_run(tracked_run(tmp_path))


def test_the_manifest_of_a_checkpoint_is_known_by_its_name() -> None:
    assert tracking._CHECKPOINT_MANIFEST == MANIFEST
