"""One MLflow run per curriculum with a child per stage, fed from the journals; the same runs after a restart."""

import json
import logging
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infra.config_io import config_hash
from infra.journal import Journal, Scalar
from infra.ledger import Ledger, RunState
from infra.mlflow_tracker import MlflowForwarder, MlflowRuns, RunStatus, TrackingError, sqlite_uri
from infra.runtime import provenance
from jobs.goodput import goodput
from jobs.recipe import Recipe
from jobs.retry_budget import spent
from jobs.run_dir import RunDir
from pipeline.manifest import read_manifest
from pipeline.storage import storage_path

logger = logging.getLogger(__name__)

STATUS: dict[str, RunStatus] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class RunTracking:
    """Forwards while open; everything it sends stands in a journal first, so it may fail without loss."""

    def __init__(self, run: RunDir, recipe: Recipe, ledger: Ledger) -> None:
        self._run, self._recipe, self._ledger = run, recipe, ledger
        self._is_on = recipe.tracking.backend == "mlflow"
        self._lock = threading.Lock()
        self._runs: MlflowRuns | None = None
        self._forwarders: dict[int, MlflowForwarder] = {}
        self._journal = Journal(run.journal(0))

    def __enter__(self) -> Self:
        if not self._ledger.read().facts.get("has_journal_head"):
            self._journal.params(self._recipe.model_dump(mode="json"))
            self._ledger.record_run(has_journal_head=True)
        self._journal.tags(self._run_tags())
        self._journal.flush()
        self._follow(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        for number in list(self._forwarders):
            self._close(number)

    def follow_stage(self, number: int) -> None:
        """Starts to forward a stage's journal to its own run."""
        self._follow(number)

    def finish_stage(self, number: int, outcome: str) -> None:
        """Sends what is left of a stage and puts its scores, its faults and the goodput so far on the parent run, at
        step = stage number.
        """
        state = self._ledger.read()
        scores = state.stage(number).facts.get("scores")
        if outcome == "done" and scores:
            self._journal.metrics(number, scores)
        used, time_of = spent(state.stage(number).starts), goodput(self._run)
        counts = {"crashes": used.crashes, "preemptions": used.preemptions, "rollbacks": used.rollbacks}
        self._journal.metrics(number, {f"faults/{name}": float(count) for name, count in counts.items()})
        self._journal.metrics(number, {"perf/goodput": time_of.share, "perf/lost_s": time_of.lost_s})
        self._journal.tags(
            {"drift": json.dumps(state.facts.get("drift", []))} if "drift" in state.facts else {}
        )
        self._journal.flush()
        self._close(number)
        from jobs.champion import register_or_say  # imports torch, which this process does without until here

        register_or_say(self._run, self._runs, stage_runs(self._ledger.read()))
        self._set_status(number, outcome)

    def finish_run(self, outcome: str) -> None:
        """Sends what is left of the parent run and closes it."""
        self._journal.flush()
        self._close(0)
        self._set_status(0, outcome)

    def _follow(self, number: int) -> None:
        if self._is_on:
            self._forwarders[number] = MlflowForwarder(
                self._run.journal(number), lambda: self._open(number), poll_s=2.0
            )

    def _close(self, number: int) -> None:
        forwarder = self._forwarders.pop(number, None)
        if forwarder is not None:
            forwarder.close()

    def _open(self, number: int) -> tuple[Any, str]:
        """Client and run id; the parent run is made first. Called in forwarder threads."""
        with self._lock:
            if self._runs is None:
                self._runs = open_mlflow(self._recipe)
            run_id = self._ensure(self._runs, 0)
            if number:
                run_id = self._ensure(self._runs, number)
            return self._runs.client, run_id

    def _ensure(self, runs: MlflowRuns, number: int) -> str:
        facts = self._ledger.read().facts
        fact = fact_name(number)
        stage = self._recipe.stages[number - 1] if number else None
        # The folder's name, which is the recipe's unless one was given: variants of a recipe can be told apart.
        run_name = self._run.path.name
        name = run_name if stage is None else f"{run_name} / {number} {stage.name}"
        parent = None if number == 0 else facts[fact_name(0)]
        run_id = runs.ensure(
            f"{self._run.run_id}-{number}", name, parent, self._tags(number), run_id=facts.get(fact)
        )
        if run_id != facts.get(fact):
            self._ledger.record_run(**{fact: run_id})
        return run_id

    def _set_status(self, number: int, outcome: str) -> None:
        run_id = self._ledger.read().facts.get(fact_name(number))
        if self._runs is None or run_id is None:
            return
        try:
            self._runs.finish(run_id, STATUS[outcome])
        except TrackingError as error:
            logger.warning("%s; the run directory holds everything", error)

    def _tags(self, number: int) -> dict[str, Scalar]:
        if number == 0:
            return {"kind": "curriculum"}
        stage = self._recipe.stages[number - 1]
        return {
            "kind": "stage",
            "stage": f"{number} {stage.name}",
            "num_frames": stage.num_frames,
            "keep_rate": stage.keep_rate,
            "data_fingerprint": self._fingerprint(),
            "recipe_hash": config_hash(self._recipe),
            "run_dir": str(self._run.path),
        }

    def _run_tags(self) -> dict[str, Scalar]:
        facts = provenance()
        return {
            "run_dir": str(self._run.path),
            "recipe_hash": config_hash(self._recipe),
            "data_fingerprint": self._fingerprint(),
            "commit": facts["commit"],
            "is_dirty": facts["is_dirty"],
            "world_size": self._recipe.cluster.num_workers,
            **{f"version.{name}": version for name, version in facts["packages"].items()},
        }

    def _fingerprint(self) -> str:
        return read_manifest(storage_path(self._recipe.data.shards) / "train").fingerprint


def fact_name(number: int) -> str:
    """Under which name the ledger keeps the MLflow run id of the parent (0) or of a stage."""
    return "mlflow_run" if number == 0 else f"mlflow_run_stage_{number}"


def stage_runs(state: RunState) -> dict[int, str]:
    """MLflow's run ids by number of the stage, as far as the ledger knows them."""
    return {n: state.facts[fact_name(n)] for n in sorted(state.stages) if fact_name(n) in state.facts}


def tracking_uri(recipe: Recipe) -> str:
    """The recipe's MLflow address, or an SQLite file in the workspace."""
    return recipe.tracking.uri or sqlite_uri(Path(recipe.workspace) / "mlflow.db")


def open_mlflow(recipe: Recipe) -> MlflowRuns:
    """Connects to MLflow. Raises TrackingError."""
    return MlflowRuns(
        tracking_uri(recipe), recipe.tracking.experiment, Path(recipe.workspace) / "mlartifacts"
    )
