"""`status`, `stop` and `logs` of a run, from its folder alone."""

import json
from collections.abc import Callable
from pathlib import Path

from small_runs import finish_stage, report_training, small_run

from infra.ledger import Ledger
from jobs.heartbeat import Heartbeat
from jobs.progress import ProgressReport
from jobs.status import run_status, show_logs, show_status
from jobs.stop import ask_to_stop

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


def test_a_stop_that_was_asked_for_shows_in_the_status(tmp_path: Path, report_lines: Report) -> None:
    report, lines = report_lines
    run = small_run(tmp_path)
    ask_to_stop(run, "user")
    show_status(run, report)
    assert "a stop was asked for (user)" in lines()


def test_a_running_stage_shows_its_step_time_left_faults_and_budget(
    tmp_path: Path, report_lines: Report
) -> None:
    report, lines = report_lines
    run = small_run(tmp_path)
    ledger = Ledger(run.ledger_file)
    ledger.record_attempt(1, "job")
    ledger.record_start(1, 1)
    generation = ledger.record_start(1, 1, died_at=6)
    heart = Heartbeat(run.heartbeats(1) / "rank-0", generation, 0)
    heart.beat(12, "step")
    heart.close()
    report_training(run, 1, {10: 5.0})
    # 28 steps of 500 ms are left.
    assert run_status(run).stages[0].eta_s == 14.0
    show_status(run, report)
    said = lines()
    assert "stage 1 (short): step 12 of 40, about 14 s left" in said
    assert "faults survived: 1 crashes" in said
    assert "budget left: 2 crashes, 1000 preemptions, 2 rollbacks" in said


def test_a_failed_stage_says_why(tmp_path: Path, report_lines: Report) -> None:
    report, lines = report_lines
    run = small_run(tmp_path)
    Ledger(run.ledger_file).record_stage(1, "failed", reason="2 crashes in a row at step 7")
    show_status(run, report)
    assert "stage 1 (short) failed: 2 crashes in a row at step 7" in lines()


def test_all_of_it_can_be_read_by_a_program(tmp_path: Path, report_lines: Report) -> None:
    report, lines = report_lines
    run = small_run(tmp_path)
    finish_stage(run, 1, 40)
    show_status(run, report, as_json=True)
    found = json.loads("\n".join(lines()))
    assert [stage["status"] for stage in found["stages"]] == ["done", "pending"]
    assert found["stages"][0]["scores"]["eval/egomcq/intra_video_acc"] == 48.0
    assert found["goodput_share"] == 0.0


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
