"""`status` and `logs` of a run: what its folder says, whatever cluster it runs on."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.ledger import Ledger, StageState
from jobs.follow import latest
from jobs.goodput import Goodput, goodput
from jobs.heartbeat import read_beats
from jobs.progress import ProgressReport
from jobs.recipe import Recipe
from jobs.retry_budget import Spent, spent
from jobs.run_dir import RunDir
from jobs.stop import stop_reason
from jobs.summary import (
    DAMAGED_STEPS,
    NON_FINITE_STEPS,
    SCORED_CHECKPOINTS,
    SKIPPED_WINDOWS,
    planned_steps,
    stage_table,
)
from jobs.tracking import fact_name, tracking_uri


@dataclass(frozen=True)
class StageStatus:
    """One stage, in numbers. Ages and times are seconds; `step` is the one being computed, from the ranks' heartbeats,
    `saved_step` that of the newest checkpoint.
    """

    number: int
    name: str
    status: str
    step: int
    saved_step: int
    num_steps: int | None
    eta_s: float | None
    clips_per_s: float | None
    checkpoint: str | None
    checkpoint_age_s: float | None
    scores: Mapping[str, float]
    attempts: int
    faults: Mapping[str, int]
    budget_left: Mapping[str, int]
    reason: str


@dataclass(frozen=True)
class RunStatus:
    """What `svitt status --json` prints."""

    run_dir: str
    recipe: str
    stages: tuple[StageStatus, ...]
    stop_asked_for: str | None
    goodput: Goodput
    mlflow_run: str | None

    @property
    def current(self) -> StageStatus:
        """The first stage that is not done; the last one when all are."""
        return next((stage for stage in self.stages if stage.status != "done"), self.stages[-1])


def run_status(run: RunDir, clock: Callable[[], float] = time.time) -> RunStatus:
    """Reads everything anew."""
    recipe, state = run.recipe(), Ledger(run.ledger_file).read()
    first = state.facts.get("budget_from", 0)
    stages = tuple(
        _stage_status(run, recipe, number, state.stage(number), first, clock())
        for number in range(1, len(recipe.stages) + 1)
    )
    return RunStatus(
        run_dir=str(run.path),
        recipe=recipe.name,
        stages=stages,
        stop_asked_for=stop_reason(run),
        goodput=goodput(run),
        mlflow_run=state.facts.get(fact_name(0)),
    )


def _stage_status(
    run: RunDir, recipe: Recipe, number: int, state: StageState, budget_from: int, now_s: float
) -> StageStatus:
    stage = recipe.stages[number - 1]
    newest, generation = latest(run, number, "train/loss"), state.starts[-1].generation if state.starts else 0
    beats = [beat for beat in read_beats(run.heartbeats(number)) if beat.generation == generation]
    saved = state.facts.get("step", 0)
    step = max([saved, *(beat.step for beat in beats)]) if state.status == "running" else saved
    total = planned_steps(recipe, stage, state.facts)
    eta_s = None
    if newest is not None and total is not None and state.status == "running":
        eta_s = (total - step) * newest.values["perf/step_ms"] / 1e3
    path = state.facts.get("checkpoint")
    used = spent([start for start in state.starts if start.generation > budget_from])
    scored = state.facts.get(SCORED_CHECKPOINTS, {})
    scores = state.facts.get("scores") or (scored[max(scored, key=int)] if scored else {})
    return StageStatus(
        number=number,
        name=stage.name,
        status=state.status,
        step=step,
        saved_step=saved,
        num_steps=total,
        eta_s=eta_s,
        clips_per_s=None if newest is None else newest.values["perf/clips_per_s"],
        checkpoint=path,
        checkpoint_age_s=_age_s(path, now_s),
        scores=scores,
        attempts=state.attempts,
        faults=_faults(state),
        budget_left=_budget_left(recipe, used),
        reason=state.facts.get("reason", "") if state.status == "failed" else "",
    )


def _age_s(checkpoint: str | None, now_s: float) -> float | None:
    manifest = Path(checkpoint) / "manifest.json" if checkpoint else None
    return round(now_s - manifest.stat().st_mtime, 1) if manifest and manifest.is_file() else None


def _faults(state: StageState) -> dict[str, int]:
    """What the stage has come through so far, over all its starts."""
    used = spent(state.starts)
    return {
        "crashes": used.crashes,
        "preemptions": used.preemptions,
        "rollbacks": used.rollbacks,
        "damaged_steps": len(state.facts.get(DAMAGED_STEPS, {})),
        "non_finite_steps": len(state.facts.get(NON_FINITE_STEPS, {})),
        "skipped_steps": sum(end - first for first, end in state.facts.get(SKIPPED_WINDOWS, [])),
    }


def _budget_left(recipe: Recipe, used: Spent) -> dict[str, int]:
    cluster = recipe.cluster
    return {
        "crashes": cluster.max_failures - used.crashes,
        "preemptions": cluster.max_preemptions - used.preemptions,
        "rollbacks": recipe.guard.max_rollbacks - used.rollbacks,
    }


def show_status(run: RunDir, report: ProgressReport, as_json: bool = False) -> None:
    """The table of stages, what goes on now, and where to look further; or all of it as JSON."""
    status = run_status(run)
    if as_json:
        report.console.print_json(json.dumps(asdict(status) | {"goodput_share": status.goodput.share}))
        return
    report.console.print(stage_table(run))
    for line in status_lines(status, run.recipe()):
        report.say(line)


def status_lines(status: RunStatus, recipe: Recipe) -> list[str]:
    """What the table does not show."""
    now, lines = status.current, []
    if now.status == "running":
        eta = "" if now.eta_s is None else f", about {_duration(now.eta_s)} left"
        lines.append(f"stage {now.number} ({now.name}): step {now.step} of {now.num_steps}{eta}")
    if now.reason:
        lines.append(f"stage {now.number} ({now.name}) failed: {now.reason}")
    saved = next((stage for stage in reversed(status.stages) if stage.checkpoint), None)
    if saved is not None:
        age = f", {_duration(saved.checkpoint_age_s)} old" if saved.checkpoint_age_s is not None else ""
        lines.append(f"newest checkpoint: {saved.checkpoint}{age}")
    met = {name: sum(stage.faults[name] for stage in status.stages) for name in now.faults}
    told = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in met.items() if number)
    if told:
        lines.append(f"faults survived: {told}")
    if now.status in ("running", "failed"):
        left = ", ".join(f"{number} {name}" for name, number in now.budget_left.items())
        lines.append(f"budget left: {left}")
    if status.goodput.wall_s:
        lines.append(status.goodput.line())
    if status.stop_asked_for:
        lines.append(f"a stop was asked for ({status.stop_asked_for})")
    if recipe.tracking.backend == "mlflow":
        lines.append(f"MLflow: {tracking_uri(recipe)}, run {status.mlflow_run or 'not created yet'}")
    return lines


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )


def show_logs(run: RunDir, num_lines: int, report: ProgressReport) -> None:
    """The last lines of every log of the newest attempt of each stage."""
    run.recipe()
    found = sorted(run.path.glob("stage-*/logs/*.log"))
    if not found:
        report.say(f"no log yet in {run.path}: no stage has started")
    for path in found:
        report.say(f"== {path.relative_to(run.path)}")
        for line in path.read_text(errors="replace").splitlines()[-num_lines:]:
            report.say(line)
