"""The runs of an MLflow experiment: found again by stable keys, made of facts that the caller has on record.

Only the modules infra/mlflow_* import mlflow (2 s); nothing that trains needs it in its process. Checkpoints are not
uploaded: tags point to files of the run directory.
"""

import contextlib
import json
import logging
import os
import sqlite3
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlflow.entities import Dataset, DatasetInput, InputTag, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from infra.journal import Scalar
from infra.redaction import redacted

logger = logging.getLogger(__name__)

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

_KEY = "svitt.key"
_SQLITE = "sqlite:///"
_LONGEST_DIGEST = 36  # what MLflow's column takes


class TrackingError(Exception):
    """MLflow cannot be reached or refuses; training goes on without it."""


@dataclass(frozen=True, slots=True)
class DataInput:
    """The clips a run was trained on: where, which (a fingerprint in hex), how many."""

    source: str
    fingerprint: str
    num_clips: int


def sqlite_uri(path: Path) -> str:
    """The tracking address of an SQLite file."""
    return f"{_SQLITE}{path.resolve()}"


class MlflowRuns:
    """The runs of one experiment. A run is found again by its key: creating it twice gives the same run."""

    def __init__(self, uri: str, experiment: str, artifact_dir: Path) -> None:
        """Connect, creating database and experiment if they are missing (about 3 s for a new SQLite file)."""
        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.uri = uri
        with _translated(f"opening MLflow at {redacted(uri)}"):
            if uri.startswith(_SQLITE):
                _create_sqlite(Path(uri.removeprefix(_SQLITE)))
            self.client = MlflowClient(tracking_uri=uri)
            self.experiment_id = self._experiment(experiment, artifact_dir)

    def ensure(
        self,
        key: str,
        name: str,
        parent_run_id: str | None = None,
        tags: Mapping[str, Scalar] | None = None,
        run_id: str | None = None,
        start_ms: int | None = None,
        data: DataInput | None = None,
    ) -> str:
        """Id of the run with this key, created if needed and set to RUNNING; tags are added or replaced.

        `run_id` is what the caller remembers; if MLflow no longer has it, the run is looked up by key. `start_ms` since
        1970 is that of a run to be created. One caller at a time for a key. Raises TrackingError.
        """
        key = key.replace("'", "")  # MLflow's search has no way to quote it
        all_tags = {_KEY: key, **{k: str(v) for k, v in (tags or {}).items()}}
        if parent_run_id is not None:
            all_tags["mlflow.parentRunId"] = parent_run_id
        with _translated(f"opening the MLflow run {name!r}"):
            found = self._known(run_id) or next((run.info.run_id for run in self._with_key(key)), None)
            if found is None:
                found = self._create(key, name, all_tags, start_ms)
            else:
                self.client.update_run(found, status="RUNNING", name=name)
                self.client.log_batch(found, tags=[RunTag(k, v) for k, v in all_tags.items()])
            if data is not None:
                self.client.log_inputs(found, [_dataset_input(data)])
            return found

    def finish(self, run_id: str, status: RunStatus, end_ms: int | None = None) -> None:
        """Close a run, at `end_ms` since 1970 or now. Raises TrackingError."""
        with _translated(f"closing the MLflow run {run_id}"):
            self.client.set_terminated(run_id, status, end_ms)

    def discard(self, run_id: str) -> None:
        """Move a run to MLflow's trash, if it is not there yet. Raises TrackingError."""
        with _translated(f"discarding the MLflow run {run_id}"):
            if self._known(run_id) is not None:
                self.client.delete_run(run_id)

    def attach_text(self, run_id: str, file_name: str, text: str) -> None:
        """Keep a text as an artifact of a run. Raises TrackingError."""
        with _translated(f"uploading {file_name} to the MLflow run {run_id}"):
            self.client.log_text(run_id, text, file_name)

    def _create(self, key: str, name: str, tags: Mapping[str, str], start_ms: int | None) -> str:
        """One run, also where the answer of a first request was lost and the client repeated it."""
        run_id = self.client.create_run(self.experiment_id, start_ms, dict(tags), name).info.run_id
        for run in self._with_key(key):
            if run.info.run_id != run_id:
                self.client.delete_run(run.info.run_id)
        return run_id

    def _experiment(self, name: str, artifact_dir: Path) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        # An absolute place: the default is a folder of whatever directory a process runs in. A server has its own.
        place = None if self.uri.startswith(("http:", "https:")) else artifact_dir.resolve().as_uri()
        try:
            return self.client.create_experiment(name, artifact_location=place)
        except MlflowException:
            found = self.client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
            return found.experiment_id

    def _known(self, run_id: str | None) -> str | None:
        if run_id is None:
            return None
        try:
            info = self.client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return info.run_id if info.lifecycle_stage == "active" else None

    def _with_key(self, key: str) -> list[Run]:
        return list(self.client.search_runs([self.experiment_id], f"tags.`{_KEY}` = '{key}'"))


def brief(error: BaseException) -> str:
    """Type and message of an error in one line, without secrets."""
    return f"{type(error).__name__}: {redacted(' '.join(str(error).split()))[:300]}"


def _dataset_input(data: DataInput) -> DatasetInput:
    source = json.dumps({"uri": redacted(data.source)})
    profile = json.dumps({"num_clips": data.num_clips})
    dataset = Dataset("train", data.fingerprint[:_LONGEST_DIGEST], "local", source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _create_sqlite(path: Path) -> None:
    """Make a new database whole before anybody opens it.

    MLflow builds its tables in some sixty migrations, each flushed to disk; in memory they take 2.6 s of CPU and
    no waiting (17 s were seen on a busy disk). Two processes doing this at once end with one file.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        draft, whole = Path(folder) / "mlflow.db", path.with_name(f"{path.name}.{os.getpid()}.tmp")
        MlflowClient(tracking_uri=f"{_SQLITE}{draft}").search_experiments(max_results=1)
        with (
            contextlib.closing(sqlite3.connect(draft)) as source,
            contextlib.closing(sqlite3.connect(whole)) as copy,
        ):
            source.backup(copy)
    with contextlib.suppress(FileExistsError):
        os.link(whole, path)
    whole.unlink()


class _translated:  # noqa: N801  (used like a function)
    """Turn what MLflow raises into TrackingError that says what was being done."""

    def __init__(self, action: str) -> None:
        self._action = action

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise TrackingError(f"{self._action} failed: {brief(error)}") from error
