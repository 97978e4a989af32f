"""MLflow fed from journals: runs with stable ids, points forwarded exactly once, training never waiting.

The only module that imports mlflow (2 s); nothing that trains needs it in its process. Artifacts are not
uploaded: tags point to files of the run directory.
"""

import contextlib
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from infra.journal import Record, Scalar, read_journal

logger = logging.getLogger(__name__)

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

_KEY = "svitt.key"
_SQLITE = "sqlite:///"
_BATCH = 500  # MLflow takes at most 1000 metrics, 100 params and 100 tags at once
_SMALL_BATCH = 100
_LONGEST_VALUE = 5000


class TrackingError(Exception):
    """MLflow cannot be reached or refuses; training goes on without it."""


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
        with _translated(f"opening MLflow at {_without_password(uri)}"):
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
    ) -> str:
        """Id of the run with this key, created if needed and set to RUNNING; tags are added or replaced.

        `run_id` is what the caller remembers; if MLflow no longer has it, the run is looked up by key.
        """
        all_tags = {_KEY: key, **{k: str(v) for k, v in (tags or {}).items()}}
        if parent_run_id is not None:
            all_tags["mlflow.parentRunId"] = parent_run_id
        with _translated(f"opening the MLflow run {name!r}"):
            found = self._known(run_id) or self._find(key)
            if found is None:
                return self.client.create_run(self.experiment_id, tags=all_tags, run_name=name).info.run_id
            self.client.update_run(found, status="RUNNING", name=name)
            self.client.log_batch(found, tags=[RunTag(k, v) for k, v in all_tags.items()])
            return found

    def finish(self, run_id: str, status: RunStatus) -> None:
        """Close a run."""
        with _translated(f"closing the MLflow run {run_id}"):
            self.client.set_terminated(run_id, status)

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
            return self.client.get_run(run_id).info.run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _find(self, key: str) -> str | None:
        escaped = key.replace("'", "")
        runs = self.client.search_runs([self.experiment_id], f"tags.`{_KEY}` = '{escaped}'", max_results=1)
        return runs[0].info.run_id if runs else None


class MlflowForwarder:
    """A thread that copies a growing journal into one MLflow run, each point once.

    It asks the run for the last step of every metric and sends only later ones, in order; after any failure
    it asks again. It may live in any process that sees the journal, preferably not in one that trains.
    `open_run` connects and returns (client, run id); it is called in the thread, and again after failures, so
    MLflow may be down at the start.
    """

    def __init__(
        self,
        journal: Path,
        open_run: Callable[[], tuple[MlflowClient, str]],
        poll_s: float = 1.0,
        longest_pause_s: float = 30.0,
    ) -> None:
        self._journal = journal
        self._open_run = open_run
        self._poll_s = poll_s
        self._longest_pause_s = longest_pause_s
        self._offset = 0
        self._waiting: list[Record] = []
        self._target: tuple[MlflowClient, str] | None = None
        self._last_step: dict[str, int] = {}
        self._params: dict[str, str] = {}
        self._failure: str | None = None
        self._stop = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="mlflow-forwarder", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 30.0) -> int:
        """Send what is left, for at most `timeout_s`. Returns how many journal lines stay unsent."""
        self._deadline = time.monotonic() + timeout_s
        self._stop.set()
        self._thread.join(timeout_s + 1.0)
        unsent = len(self._waiting) + len(read_journal(self._journal, self._offset)[0])
        if unsent:
            logger.warning(
                "%d journal lines have not reached MLflow (%s); they stay in %s for the next run",
                unsent,
                self._failure or "it is slow",
                self._journal,
            )
        return unsent

    def _run(self) -> None:
        pause_s = self._poll_s
        while True:
            is_last_round = self._stop.is_set()
            try:
                self._forward()
                if self._failure is not None:
                    logger.info("MLflow is back; the journal is being caught up")
                self._failure, pause_s = None, self._poll_s
                if is_last_round:
                    return
            except Exception as error:  # whatever MLflow raises must not end the thread
                self._target = None
                if self._failure is None:
                    logger.warning(
                        "MLflow does not take points (%s); training goes on, will retry", _brief(error)
                    )
                self._failure = _brief(error)
                pause_s = min(2 * pause_s, self._longest_pause_s)
            if time.monotonic() > self._deadline:
                return
            if self._stop.is_set():
                time.sleep(min(pause_s, 0.5))
            else:
                self._stop.wait(pause_s)

    def _forward(self) -> None:
        records, self._offset = read_journal(self._journal, self._offset)
        self._waiting += [record for record in records if record.kind != "resume"]
        if not self._waiting:
            return
        client, run_id = self._connect()
        while self._waiting:
            chunk = self._waiting[:_BATCH]
            self._send(client, run_id, chunk)
            del self._waiting[: len(chunk)]

    def _connect(self) -> tuple[MlflowClient, str]:
        if self._target is None:
            client, run_id = self._open_run()
            data = client.get_run(run_id).data
            self._last_step = {metric.key: metric.step for metric in data._metric_objs}
            self._params = dict(data.params)
            self._target = (client, run_id)
        return self._target

    def _send(self, client: MlflowClient, run_id: str, records: Sequence[Record]) -> None:
        metrics: list[Metric] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for record in records:
            if record.kind == "metrics":
                for name, value in record.values.items():
                    if record.step > self._last_step.get(name, -1):
                        metrics.append(Metric(name, value, record.time_ms, record.step))
                        self._last_step[name] = record.step
            elif record.kind == "tags":
                tags.update({name: value[:_LONGEST_VALUE] for name, value in record.values.items()})
            else:
                self._sort_params(record.values, params, tags)
        for part in _parts(metrics, _BATCH):
            client.log_batch(run_id, metrics=part)
        for part in _parts([Param(k, v) for k, v in params.items()], _SMALL_BATCH):
            client.log_batch(run_id, params=part)
        for part in _parts([RunTag(k, v) for k, v in tags.items()], _SMALL_BATCH):
            client.log_batch(run_id, tags=part)
        self._params.update(params)

    def _sort_params(self, values: Mapping[str, str], params: dict[str, str], tags: dict[str, str]) -> None:
        """MLflow's params cannot change; a setting that did becomes the tag `changed.<name>`."""
        for name, value in values.items():
            value = value[:_LONGEST_VALUE]
            known = self._params.get(name, params.get(name))
            if known is None:
                params[name] = value
            elif known != value:
                tags[f"changed.{name}"] = value


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
            raise TrackingError(f"{self._action} failed: {_brief(error)}") from error


def _parts(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _without_password(uri: str) -> str:
    scheme, sep, rest = uri.partition("://")
    credentials, at, host = rest.rpartition("@")
    return f"{scheme}{sep}***@{host}" if at and credentials else uri
