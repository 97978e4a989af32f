"""`svitt rebuild`: the MLflow runs of run directories, made again from their journals and ledgers.

For a lost MLflow, for another server, and to catch up with one that was away when a run ended. Where the runs are there
already they are completed, so it may be repeated.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from infra.config_io import ConfigError
from infra.ledger import Ledger
from infra.mlflow_forwarder import JournalCopy
from infra.mlflow_tracker import TrackingError, brief
from jobs.progress import ProgressReport
from jobs.run_dir import RunDir
from jobs.summary import unsent_name
from jobs.tracking import TrackedRuns, card_name, end_name, open_mlflow, tracking_uri


def rebuild(run_dirs: Sequence[Path], uri: str | None, report: ProgressReport) -> int:
    """Every run with its name, params, tags, points, times and end. `uri`: another MLflow than that of the recipe.

    Raises ConfigError for a folder that is no run directory or was never driven, TrackingError where MLflow refuses;
    what was made before stays, and the same command goes on from there.
    """
    for path in run_dirs:
        num_runs = rebuild_run(RunDir(path.resolve()), uri)
        report.say(f"{path}: {num_runs} MLflow runs are whole")
    return 0


def rebuild_run(run: RunDir, uri: str | None = None) -> int:
    """One run directory; how many MLflow runs it has."""
    recipe, ledger = run.recipe(), Ledger(run.ledger_file)
    state = ledger.read()
    numbers = [n for n in range(len(recipe.stages) + 1) if card_name(n) in state.facts]
    numbers = [n for n in numbers if run.journal(n).exists()]
    if not numbers:
        raise ConfigError(
            str(run.path),
            ["its ledger describes no MLflow run: no controller has driven it yet (svitt submit)"],
        )
    is_other = uri is not None and uri != tracking_uri(recipe)
    tracked = TrackedRuns(run, ledger, partial(open_mlflow, recipe, uri), remember_ids=not is_other)
    for number in numbers:
        try:
            tracked.open(number)
            copy = JournalCopy(run.journal(number), partial(tracked.open, number))
            copy.send()
            if not is_other:
                ledger.record_run(**{unsent_name(number): copy.left()[0]})
        except TrackingError:
            raise
        except Exception as error:  # MLflow raises what its transport does
            raise TrackingError(
                f"rebuilding the MLflow run of {run.journal(number)} failed: {brief(error)}"
            ) from error
    tracked.register_checkpoints()
    for number in numbers:  # after all of them are open: opening one sets its parent to RUNNING
        end = state.facts.get(end_name(number))
        if end is not None and end["attempts"] == state.stage(number).attempts:
            tracked.finish(number, end["outcome"], end["time_ms"])
    return len(numbers)
