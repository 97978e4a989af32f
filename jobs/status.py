"""`status`, `stop` and `logs` of a run: what its folder says, whatever cluster it runs on."""

from infra.ledger import Ledger
from jobs.progress import ProgressReport
from jobs.run_dir import RunDir
from jobs.summary import stage_table
from jobs.tracking import fact_name, tracking_uri


def show_status(run: RunDir, report: ProgressReport) -> None:
    """The table of stages, the newest checkpoint, and where to look further."""
    recipe, state = run.recipe(), Ledger(run.ledger_file).read()
    report.console.print(stage_table(run))
    for number in range(len(recipe.stages), 0, -1):
        if "checkpoint" in state.stage(number).facts:
            report.say(f"newest checkpoint: {state.stage(number).facts['checkpoint']}")
            break
    if run.stop_file.exists():
        report.say("a stop was asked for")
    if recipe.tracking.backend == "mlflow":
        report.say(f"MLflow: {tracking_uri(recipe)}, run {state.facts.get(fact_name(0), 'not created yet')}")


def request_stop(run: RunDir, report: ProgressReport) -> None:
    """Asks the run to save and leave; its ranks look for the request at every report."""
    run.recipe()
    run.stop_file.touch()
    report.say(
        f"asked for: the run saves and leaves after the current steps. Go on with: svitt resume {run.path}"
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
