"""Following a run: what is said of each stage, and the exit code at the end."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_jobs import FakeJobs, state
from small_runs import SCORES, finish_stage, report_training, small_run

from infra.ledger import Ledger
from jobs.follow import follow_run, latest
from jobs.progress import ProgressReport
from jobs.run_dir import RunDir

Report = tuple[ProgressReport, Callable[[], list[str]]]
JOB = "small-c1"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return small_run(tmp_path)


class Script:
    """Things that happen while somebody waits: one at every pause. Also moves the clock of the report."""

    def __init__(self, *events: Callable[[], None]) -> None:
        self.events = list(events)
        self.now_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        assert self.events, "follows on although everything has happened"
        self.events.pop(0)()


def follow(run: RunDir, jobs: FakeJobs, report: ProgressReport, script: Script) -> int:
    report.clock, report.interval_s = lambda: script.now_s, 0.5
    return follow_run(lambda: jobs.status(JOB), run, report, script.sleep)


def running() -> FakeJobs:
    return FakeJobs({JOB: state(JOB, "RUNNING")})


def end(jobs: FakeJobs, status: str, exit_code: int | None, message: str = "") -> None:
    jobs.states[JOB] = state(JOB, status, exit_code, message)


def test_every_stage_is_announced_and_its_scores_told(run: RunDir, report_lines: Report) -> None:
    report, lines = report_lines
    jobs = running()

    def finish_all() -> None:
        finish_stage(run, 2, 20, {})
        end(jobs, "SUCCEEDED", 0)

    script = Script(lambda: report_training(run, 1, {20: 5.0}), lambda: finish_stage(run, 1, 40), finish_all)
    assert follow(run, jobs, report, script) == 0
    said = lines()
    assert said[0].startswith("stage 1 (short): 2 frames, keep rate 0.5: 32 tokens a clip in, 8 out")
    assert said[1] == (
        "stage 1 (short): 20/40 steps, loss 5.00 (vtc 1.00, vtm 0.50, mlm 2.00), 200 clips/s eta ?"
    )
    assert "stage 1 (short): done. EgoMCQ inter 71.2 [66.4, 75.6] (n 400); intra 48.0" in "\n".join(said)
    (second,) = [line for line in said if line.startswith("stage 2 (long): 4 frames")]
    assert said.index(second) > said.index(next(line for line in said if "stage 1 (short): done" in line))
    assert said[-1].startswith("stage 2 (long): done.")


def test_a_stage_done_before_is_not_announced_as_new(run: RunDir, report_lines: Report) -> None:
    report, lines = report_lines
    finish_stage(run, 1, 40)
    finish_stage(run, 2, 20)
    jobs = FakeJobs({JOB: state(JOB, "SUCCEEDED", 0)})
    assert follow(run, jobs, report, Script()) == 0
    assert [line.split(". ")[0] for line in lines()] == [
        "stage 1 (short): done before, not repeated",
        "stage 2 (long): done before, not repeated",
    ]


def test_a_stage_that_goes_on_says_from_where(run: RunDir, report_lines: Report) -> None:
    report, lines = report_lines
    Ledger(run.ledger_file).record_stage(1, "running", step=10, num_steps=40, checkpoint="there")
    jobs = FakeJobs({JOB: state(JOB, "FAILED", 1, "died")})
    follow(run, jobs, report, Script())
    assert "stage 1 (short): continues from its checkpoint of step 10" in lines()


def test_while_it_is_scored_the_progress_says_so(run: RunDir, report_lines: Report) -> None:
    report, lines = report_lines
    jobs = running()
    report_training(run, 1, {40: 4.0})
    Ledger(run.ledger_file).record_stage(1, "trained", step=40, num_steps=40, checkpoint="there")
    script = Script(lambda: None, lambda: end(jobs, "FAILED", 1))
    follow(run, jobs, report, script)
    assert any("40/40 steps, loss 4.00" in line and "clips/s, scoring" in line for line in lines())


def test_a_failed_run_shows_the_end_of_the_logs_and_what_to_do(run: RunDir, report_lines: Report) -> None:
    report, lines = report_lines
    ledger = Ledger(run.ledger_file)
    ledger.record_attempt(1, "job-a1")
    ledger.record_stage(1, "failed")
    log = run.stage_dir(1) / "logs" / "attempt-1-rank-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {number}\n" for number in range(9)))
    (log.parent / "attempt-1-rank-1.log").touch()
    message = "exit code 1, last available logs (truncated to 20,000 chars):\nnoise"
    jobs = FakeJobs({JOB: state(JOB, "FAILED", 1, message)})
    assert follow(run, jobs, report, Script()) == 1
    said = "\n".join(lines())
    assert "stage 1: failed after 1 attempts (exit code 1)" in said
    assert "line 8" in said
    assert "line 3" not in said
    assert "noise" not in said
    assert "rank-1" not in said
    assert f"svitt resume {run.path}" in said


def test_a_stopped_run_says_where_it_stands_and_ends_with_three(run: RunDir, report_lines: Report) -> None:
    report, lines = report_lines
    Ledger(run.ledger_file).record_stage(1, "stopped", step=30, num_steps=40)
    jobs = FakeJobs({JOB: state(JOB, "FAILED", 3)})
    assert follow(run, jobs, report, Script()) == 3
    assert lines()[-1] == f"stage 1: stopped at step 30; go on with: svitt resume {run.path}"


def test_a_controller_that_ends_without_an_exit_code_is_a_failure(run: RunDir, report_lines: Report) -> None:
    jobs = FakeJobs({JOB: state(JOB, "STOPPED", None, "stopped by somebody")})
    assert follow(run, jobs, report_lines[0], Script()) == 1


def test_a_controller_that_says_well_with_a_stage_not_done_is_a_failure(
    run: RunDir, report_lines: Report
) -> None:
    jobs = FakeJobs({JOB: state(JOB, "SUCCEEDED", 0)})
    assert follow(run, jobs, report_lines[0], Script()) == 1


def test_a_controller_that_fails_after_the_last_stage_is_a_failure(run: RunDir, report_lines: Report) -> None:
    finish_stage(run, 1, 40)
    finish_stage(run, 2, 20)
    jobs = FakeJobs({JOB: state(JOB, "FAILED", None, "killed")})
    assert follow(run, jobs, report_lines[0], Script()) == 1


def test_the_newest_record_is_the_last_that_holds_the_metric(run: RunDir) -> None:
    assert latest(run, 1, "train/loss") is None
    report_training(run, 1, {10: 5.0, 20: 4.0})
    record = latest(run, 1, "train/loss")
    assert record is not None
    assert (record.step, record.values["train/loss"]) == (20, 4.0)
    assert latest(run, 1, "eval/egomcq/inter_video_acc") is None
    assert SCORES  # scores stand in the ledger, not in the journal
