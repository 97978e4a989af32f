"""Follows a run from its ledger and journals: progress while it works, a summary of every finished stage."""

import time
from collections.abc import Callable

from infra.journal import Record, valid_records
from infra.ledger import Ledger, StageState
from infra.ray_jobs import JobState
from jobs.progress import ProgressReport, ProgressTask
from jobs.run_dir import RunDir
from jobs.summary import describe_scores, describe_stage, planned_steps

POLL_S = 1.0


def follow_run(
    look: Callable[[], JobState],
    run: RunDir,
    report: ProgressReport,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Reports on one stage after the other until what drives the run ends, as `look` says. Returns its exit code."""
    recipe, ledger = run.recipe(), Ledger(run.ledger_file)
    for number, stage in enumerate(recipe.stages, start=1):
        state = ledger.read().stage(number)
        title = f"stage {number} ({stage.name})"
        if state.status == "done":
            report.say(
                f"{title}: done before, not repeated. {describe_scores(state.facts.get('scores', {}))}"
            )
            continue
        report.say(f"{title}: {describe_stage(recipe, stage)}")
        if "step" in state.facts:
            report.say(f"{title}: continues from its checkpoint of step {state.facts['step']}")
        with report.task(title, planned_steps(recipe, stage, state.facts) or 0) as task:
            job = _follow_stage(look, run, ledger, number, task, sleep)
        state = ledger.read().stage(number)
        if state.status != "done":
            if not job.was_killed:
                _explain(job, run, number, state, report)
            return job.shell_code or 1
        report.say(f"{title}: done. {describe_scores(state.facts.get('scores', {}))}")
    while not (job := look()).is_finished:
        sleep(POLL_S)
    return job.shell_code


def _follow_stage(
    look: Callable[[], JobState],
    run: RunDir,
    ledger: Ledger,
    number: int,
    task: ProgressTask,
    sleep: Callable[[float], None],
) -> JobState:
    # What stands there from before an interruption is not progress: the stage goes on from its checkpoint.
    before = latest(run, number, "train/loss") if ledger.read().stage(number).status == "running" else None
    while True:
        job = look()
        state = ledger.read().stage(number)
        step = latest(run, number, "train/loss")
        if step is not None and step != before:
            task.set(step.step, _note(step, state))
        if state.status == "done" or job.is_finished:
            return job
        sleep(POLL_S)


def latest(run: RunDir, number: int, metric: str) -> Record | None:
    """The newest journal entry of a stage that holds this metric."""
    records = [r for r in valid_records(run.journal(number)) if r.kind == "metrics" and metric in r.values]
    return records[-1] if records else None


def _note(record: Record, state: StageState) -> str:
    values = record.values
    note = (
        f"steps, loss {values['train/loss']:.2f} (vtc {values['train/vtc']:.2f}, vtm {values['train/vtm']:.2f}, "
        f"mlm {values['train/mlm']:.2f}), {values['perf/clips_per_s']:.0f} clips/s"
    )
    return f"{note}, scoring" if state.status == "trained" else note


def _explain(job: JobState, run: RunDir, number: int, state: StageState, report: ProgressReport) -> None:
    if state.status == "stopped":
        report.say(
            f"stage {number}: stopped at step {state.facts.get('step', 0)}; go on with: svitt resume {run.path}"
        )
        return
    # Ray appends the controller's log, which says less than the stage's own.
    message = job.message.partition(", last available logs")[0]
    report.say(f"stage {number}: {state.status} after {state.attempts} attempts ({message})")
    # The newest: what the stage's last job said when it ended, or a rank where it did not come to that.
    logs = [path for path in (run.stage_dir(number) / "logs").glob("*.log") if path.stat().st_size]
    if logs:
        path = max(logs, key=lambda path: (path.stat().st_mtime_ns, path.name))
        report.say(f"  the last lines of {path}:")
        for line in path.read_text(errors="replace").splitlines()[-5:]:
            report.say(f"    {line}")
    report.say(f"  more with: svitt logs {run.path}; after a repair go on with: svitt resume {run.path}")
