"""One MLflow run per curriculum with a child per stage, fed from the journals; the same runs after a restart.

What MLflow is told stands in the run directory first: points, params and tags in the journals; name, tags, data and end
of each MLflow run in the ledger. So it may be away, and `svitt rebuild` makes the same runs anywhere.
"""

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock

from infra.config_io import config_hash
from infra.journal import Journal, Scalar, first_time_ms
from infra.ledger import Ledger, RunState
from infra.mlflow_forwarder import MlflowForwarder
from infra.mlflow_tracker import DataInput, MlflowRuns, RunStatus, TrackingError, sqlite_uri
from infra.redaction import redacted_mapping
from infra.runtime import provenance
from jobs.goodput import goodput
from jobs.recipe import Recipe
from jobs.retry_budget import spent
from jobs.run_dir import RunDir
from jobs.summary import unsent_name
from pipeline.manifest import read_manifest
from pipeline.storage import storage_path

logger = logging.getLogger(__name__)

_CHECKPOINT_MANIFEST = "manifest.json"  # of infra.checkpoint_files, which needs torch
STATUS: dict[str, RunStatus] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True, slots=True)
class RunCard:
    """Who an MLflow run is. The key is that of one life of a run directory: a run started afresh in the same place is
    another one.
    """

    key: str
    name: str
    tags: dict[str, Scalar]
    data: DataInput


class TrackedRuns:
    """The MLflow runs of one run directory, by number: 0 is the curriculum, stages count from 1."""

    def __init__(
        self, run: RunDir, ledger: Ledger, connect: Callable[[], MlflowRuns], remember_ids: bool = True
    ) -> None:
        """`connect` may raise TrackingError, and is asked again. Without `remember_ids` the ledger stays as it is: for
        a server beside the recipe's.
        """
        self._run, self._ledger, self._connect = run, ledger, connect
        self._remember_ids = remember_ids
        self._runs: MlflowRuns | None = None
        self._ids: dict[int, str] = {}
        self._lock = threading.Lock()

    def open(self, number: int, outdated: str | None = None) -> tuple[Any, str]:
        """Client and run id; the parent run is made first. `outdated` names a run to be replaced. Raises
        TrackingError. For forwarder threads.
        """
        # The file lock is for a controller that was taken for dead, or a rebuild beside it.
        with self._lock, FileLock(self._run.path / "mlflow.lock"):
            if self._runs is None:
                self._runs = self._connect()
            if outdated is not None:
                self._runs.discard(outdated)
            run_id = self._ensure(self._runs, 0, None)
            if number:
                run_id = self._ensure(self._runs, number, run_id)
            return self._runs.client, run_id

    def register_checkpoints(self) -> list[str]:
        """Makes logged models and versions of the checkpoints of the stages that were opened here, and moves aliases.
        Returns what was done. Raises TrackingError; what failed is done by the next call.
        """
        from jobs.champion import register_run  # imports torch, which a controller does without until here

        if self._runs is None:
            return []
        return register_run(self._run, self._runs, {n: run_id for n, run_id in dict(self._ids).items() if n})

    def finish(self, number: int, outcome: str, end_ms: int) -> None:
        """Tells MLflow how and when a run ended; where it cannot be told, that is logged."""
        if self._runs is None or number not in self._ids:
            return
        try:
            self._runs.finish(self._ids[number], STATUS[outcome], end_ms)
        except TrackingError as error:
            logger.warning("%s; later: svitt rebuild %s", error, self._run.path)

    def _ensure(self, runs: MlflowRuns, number: int, parent: str | None) -> str:
        facts = self._ledger.read().facts
        card, known = read_card(facts, number), facts.get(fact_name(number))
        run_id = runs.ensure(
            card.key,
            card.name,
            parent,
            card.tags,
            run_id=known if self._remember_ids else self._ids.get(number),
            start_ms=first_time_ms(self._run.journal(number)),
            data=card.data,
        )
        if number == 0 and self._ids.get(0) != run_id:
            self._attach_recipe(runs, run_id)
        self._ids[number] = run_id
        if self._remember_ids and run_id != known:
            self._ledger.record_run(**{fact_name(number): run_id})
        return run_id

    def _attach_recipe(self, runs: MlflowRuns, run_id: str) -> None:
        try:
            runs.attach_text(run_id, self._run.recipe_file.name, self._run.recipe_file.read_text())
        except TrackingError as error:  # an artifact store that refuses must not keep the points back
            logger.warning("%s; the recipe stands in %s", error, self._run.recipe_file)


class RunTracking:
    """Forwards while open; everything it sends stands in a journal or the ledger first, so it may fail without loss."""

    def __init__(
        self, run: RunDir, recipe: Recipe, ledger: Ledger, clock: Callable[[], float] = time.time
    ) -> None:
        self._run, self._recipe, self._ledger, self._clock = run, recipe, ledger, clock
        self._is_on = recipe.tracking.backend == "mlflow"
        self._runs = TrackedRuns(run, ledger, lambda: open_mlflow(recipe))
        self._forwarders: dict[int, MlflowForwarder] = {}
        self._endings = ThreadPoolExecutor(1, "end-of-stage")
        self._journal = Journal(run.journal(0), clock=clock)

    def __enter__(self) -> Self:
        if not self._ledger.read().facts.get("has_journal_head"):
            self._journal.params(self._recipe.model_dump(mode="json"))
            self._ledger.record_run(has_journal_head=True)
        self._journal.tags(self._run_tags())
        self._journal.flush()
        self._ledger.record_run(**{end_name(0): None})
        self._follow(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        self._endings.shutdown()
        for number in list(self._forwarders):
            self._close(number)

    def follow_stage(self, number: int) -> None:
        """Starts to forward a stage's journal to its own run."""
        self._follow(number)

    def finish_stage(self, number: int, outcome: str) -> None:
        """Puts the scores of a stage, its faults and the goodput so far on the parent run, at step = stage number, and
        sends what is left of it beside whatever follows: the next stage does not wait for MLflow. A controller that
        comes to a stage which has been told already tells it no second time.
        """
        state = self._ledger.read()
        end = state.facts.get(end_name(number))
        if end is None or (end["outcome"], end["attempts"]) != (outcome, state.stage(number).attempts):
            self._tell_stage(number, outcome, state)
            time_s = state.stage(number).status_times_s.get(outcome, self._clock())
            end = {
                "outcome": outcome,
                "attempts": state.stage(number).attempts,
                "time_ms": round(1e3 * time_s),
            }
            self._ledger.record_run(**{end_name(number): end})
        self._endings.submit(self._close_stage, number, outcome, end["time_ms"])

    def finish_run(self, outcome: str) -> None:
        """Sends what is left of the parent run and closes it, after the stages."""
        self._endings.shutdown()
        self._journal.flush()
        end = {"outcome": outcome, "attempts": 0, "time_ms": round(1e3 * self._clock())}
        self._ledger.record_run(**{end_name(0): end})
        self._close(0)
        self._runs.finish(0, outcome, end["time_ms"])

    def _tell_stage(self, number: int, outcome: str, state: RunState) -> None:
        scores = state.stage(number).facts.get("scores")
        if outcome == "done" and scores:
            self._journal.metrics(number, scores)
        used, time_of = spent(state.stage(number).starts), goodput(self._run)
        counts = {"crashes": used.crashes, "preemptions": used.preemptions, "rollbacks": used.rollbacks}
        self._journal.metrics(number, {f"faults/{name}": float(count) for name, count in counts.items()})
        self._journal.metrics(number, {"perf/goodput": time_of.share, "perf/lost_s": time_of.lost_s})
        if "drift" in state.facts:
            self._journal.tags({"drift": json.dumps(state.facts["drift"])})
        self._journal.flush()

    def _follow(self, number: int) -> None:
        facts = self._ledger.read().facts
        card = asdict(self._card(number, facts))
        if facts.get(card_name(number)) != card:
            self._ledger.record_run(**{card_name(number): card})
        if self._is_on:
            self._forwarders[number] = MlflowForwarder(
                self._run.journal(number), lambda outdated=None: self._runs.open(number, outdated), poll_s=2.0
            )

    def _close_stage(self, number: int, outcome: str, end_ms: int) -> None:
        self._close(number)
        try:
            for line in self._runs.register_checkpoints():
                logger.info("%s", line)
        except Exception as error:  # whatever MLflow raises: the run goes on
            logger.warning(
                "checkpoints were not told to MLflow (%s); later: svitt champion %s", error, self._run.path
            )
        self._runs.finish(number, outcome, end_ms)

    def _close(self, number: int) -> None:
        forwarder = self._forwarders.pop(number, None)
        if forwarder is not None:
            self._ledger.record_run(**{unsent_name(number): forwarder.close()})

    def _card(self, number: int, facts: Mapping[str, Any]) -> RunCard:
        known = facts.get(card_name(number))
        key = known["key"] if known else f"{self._run.run_id}-{first_time_ms(self._run.journal(0))}-{number}"
        # The folder's name, which is the recipe's unless one was given: variants of a recipe can be told apart.
        name = self._run.path.name
        tags: dict[str, Scalar] = {"kind": "curriculum"}
        if number:
            stage = self._recipe.stages[number - 1]
            name += f" / {number} {stage.name}"
            tags = {
                "kind": "stage",
                "stage": f"{number} {stage.name}",
                "num_frames": stage.num_frames,
                "keep_rate": stage.keep_rate,
                "data_fingerprint": self._data().fingerprint,
                "recipe_hash": config_hash(self._recipe),
                "run_dir": str(self._run.path),
                **self._parent_checkpoint(number, known["tags"] if known else {}),
            }
        return RunCard(key, name, redacted_mapping(tags), self._data())

    def _parent_checkpoint(self, number: int, known: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """From which checkpoint a stage starts, with the SHA-256 of its manifest, which has those of its files; what is
        known of it outlasts the checkpoint.
        """
        path = self._ledger.read().stage(number - 1).facts.get("checkpoint") if number > 1 else None
        if path is None:
            return {}
        tags: dict[str, Scalar] = {"parent_checkpoint": path}
        if known.get("parent_checkpoint") == path:
            return {name: value for name, value in known.items() if name.startswith("parent_checkpoint")}
        with contextlib.suppress(FileNotFoundError):  # thinned out before this stage was followed
            manifest = (Path(path) / _CHECKPOINT_MANIFEST).read_bytes()
            tags["parent_checkpoint_sha256"] = hashlib.sha256(manifest).hexdigest()
        return tags

    def _run_tags(self) -> dict[str, Scalar]:
        facts = provenance()
        return {
            "run_dir": str(self._run.path),
            "recipe_hash": config_hash(self._recipe),
            "data_fingerprint": self._data().fingerprint,
            "commit": facts["commit"],
            "is_dirty": facts["is_dirty"],
            "world_size": self._recipe.cluster.num_workers,
            **{f"version.{name}": version for name, version in facts["packages"].items()},
        }

    def _data(self) -> DataInput:
        shards_dir = storage_path(self._recipe.data.shards) / "train"
        manifest = read_manifest(shards_dir)
        return DataInput(str(shards_dir), manifest.fingerprint, manifest.num_clips)


def fact_name(number: int) -> str:
    """Under which name the ledger keeps the MLflow run id of the parent (0) or of a stage."""
    return "mlflow_run" if number == 0 else f"mlflow_run_stage_{number}"


def stage_runs(state: RunState) -> dict[int, str]:
    """MLflow's run ids by number of the stage, as far as the ledger knows them."""
    return {n: state.facts[fact_name(n)] for n in sorted(state.stages) if fact_name(n) in state.facts}


def card_name(number: int) -> str:
    """Under which name the ledger keeps the card of an MLflow run."""
    return f"tracked_{number}"


def end_name(number: int) -> str:
    """Under which name the ledger keeps how a run ended, as it was told."""
    return f"ended_{number}"


def read_card(facts: Mapping[str, Any], number: int) -> RunCard:
    """A card from the facts of a ledger, which has it from the moment the run is followed."""
    card = facts[card_name(number)]
    return RunCard(card["key"], card["name"], card["tags"], DataInput(**card["data"]))


def tracking_uri(recipe: Recipe) -> str:
    """The recipe's MLflow address, or an SQLite file in the workspace."""
    return recipe.tracking.uri or sqlite_uri(Path(recipe.workspace) / "mlflow.db")


def open_mlflow(recipe: Recipe, uri: str | None = None) -> MlflowRuns:
    """Connects to MLflow, the recipe's or another one. Raises TrackingError."""
    artifacts = Path(recipe.workspace) / "mlartifacts"
    return MlflowRuns(uri or tracking_uri(recipe), recipe.tracking.experiment, artifacts)
