"""`status`, `stop` and `logs` of a run, from its folder alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import finish_stage, small_run

from infra.config_io import ConfigError
from infra.ledger import Ledger
from jobs.progress import ProgressReport
from jobs.run_dir import RunDir
from jobs.status import request_stop, show_logs, show_status

Report = tuple[ProgressReport, Callable[[], list[str]]]


def test_the_status_names_the_newest_checkpoint_and_the_mlflow_run(
    tmp_path: Path, report_lines: Report
) -> None:
    report, lines = report_lines
    run = small_run(tmp_path)
    finish_stage(run, 1, 40)
    Ledger(run.ledger_file).record_run(mlflow_run="abc")
    show_status(run, report)
    said = lines()
    assert f"newest checkpoint: {run.checkpoints(1) / 'step-00000040'}" in said
    assert f"MLflow: sqlite:///{tmp_path / 'mlflow.db'}, run abc" in said
    assert not any("a stop was asked for" in line for line in said)


def test_a_run_that_has_not_started_has_no_checkpoint_and_no_mlflow_run(
    tmp_path: Path, report_lines: Report
) -> None:
    report, lines = report_lines
    show_status(small_run(tmp_path), report)
    assert not any("checkpoint:" in line for line in lines())
    assert lines()[-1].endswith("run not created yet")


def test_a_run_without_mlflow_does_not_speak_of_it(tmp_path: Path, report_lines: Report) -> None:
    report, lines = report_lines
    show_status(small_run(tmp_path, "tracking.backend=none"), report)
    assert not any("MLflow" in line for line in lines())


def test_a_stop_leaves_a_file_says_how_to_go_on_and_shows_in_the_status(
    tmp_path: Path, report_lines: Report
) -> None:
    report, lines = report_lines
    run = small_run(tmp_path)
    request_stop(run, report)
    assert run.stop_file.exists()
    assert lines()[0].endswith(f"svitt resume {run.path}")
    show_status(run, report)
    assert "a stop was asked for" in lines()


def test_a_stop_of_no_run_is_refused_and_leaves_nothing(tmp_path: Path, report_lines: Report) -> None:
    with pytest.raises(ConfigError, match="no run directory"):
        request_stop(RunDir(tmp_path), report_lines[0])
    assert list(tmp_path.iterdir()) == []


def test_logs_shows_the_last_lines_of_every_log(tmp_path: Path, report_lines: Report) -> None:
    report, lines = report_lines
    run = small_run(tmp_path)
    for number in (1, 2):
        path = run.log_file(number, 1, 0)
        path.parent.mkdir(parents=True)
        path.write_text(f"first of {number}\nmiddle of {number}\nlast of {number}\n")
    show_logs(run, 2, report)
    assert lines() == [
        "== stage-1/logs/attempt-1-rank-0.log",
        "middle of 1",
        "last of 1",
        "== stage-2/logs/attempt-1-rank-0.log",
        "middle of 2",
        "last of 2",
    ]


def test_logs_before_the_first_stage_says_so(tmp_path: Path, report_lines: Report) -> None:
    report, lines = report_lines
    show_logs(small_run(tmp_path), 5, report)
    assert "no stage has started" in lines()[0]
