"""Journals copied into MLflow runs, every settled point exactly once and in order, through outages of any length.

What makes a point one: MLflow's tables have (run, metric, step, time, value) as primary key and leave out what they
hold already, so sending a point again changes nothing; a request may be lost before or after it was stored, be stored
in part, or come from two forwarders at once. (Two reports of one metric with the same step, millisecond and value are
one point.) What makes the sequence that of the journal: only settled records are sent (`SettledRecords`), those that no
resume will void, for MLflow cannot take a point back. How far they have come is a tag of the run, written after the
points it counts; a new forwarder starts there. It can only say too little, which costs sending again.

One thing breaks this: the newest checkpoint is damaged, the stage goes on from an earlier one, and points that were
settled are computed again. Then the MLflow run is made anew from the journal and the old one goes to MLflow's trash.
A forwarder that was away meanwhile sees it by the run's latest points, which the journal no longer has.
"""

import logging
import math
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from infra.journal import Record, SettledRecords, first_time_ms
from infra.mlflow_tracker import brief

logger = logging.getLogger(__name__)

FORWARDED = "svitt.forwarded"  # tag: how many settled records of its journal a run holds
_BATCH = 500  # MLflow takes at most 1000 metrics, 100 params and 100 tags at once
_SMALL_BATCH = 100
_LONGEST_VALUE = 5000
_LARGEST = 1.7976931348623157e308  # what MLflow keeps of an infinity


class OpenRun(Protocol):
    """Connects and returns (client, run id). `outdated` is the id of a run to be replaced by a new one: the points of
    its journal were revised. May raise anything, and is asked again.
    """

    def __call__(self, outdated: str | None = None) -> tuple[MlflowClient, str]: ...


class JournalCopy:
    """One journal on its way into one MLflow run. After any error of `send`, call it again."""

    def __init__(self, journal: Path, open_run: OpenRun) -> None:
        self._journal = journal
        self._open_run = open_run
        self._settled = SettledRecords(journal)
        self._pending: list[Record] = []
        self._target: tuple[MlflowClient, str] | None = None
        self._outdated: str | None = None
        self._num_sent = 0
        self._params: dict[str, str] = {}

    def send(self) -> None:
        """Brings the run up to the settled part of the journal. Raises what MLflow raises."""
        if first_time_ms(self._journal) is None:
            return
        if self._target is not None:
            self._pending += self._settled.read()
            if self._settled.is_revised:
                self._target = None
        try:
            client, run_id = self._target or self._connect()
            while self._pending:
                self._send(client, run_id, self._pending[:_BATCH])
        except Exception:
            self._target = None
            raise

    def left(self) -> tuple[int, int]:
        """How many settled lines MLflow is not known to have, and how many wait for a checkpoint."""
        settled = SettledRecords(self._journal)
        return max(0, len(settled.read()) - self._num_sent), len(settled.waiting)

    def _connect(self) -> tuple[MlflowClient, str]:
        client, run_id = self._open_run(self._outdated)
        run = client.get_run(run_id)
        settled = SettledRecords(self._journal)
        records = settled.read()
        if not _all_stand_in(run.data._metric_objs, [*records, *settled.waiting], settled.metric_names):
            logger.warning(
                "%s: steps were computed again whose points MLflow's run %s has, from a checkpoint before the last "
                "one; the run is made anew from the journal, that one goes to the trash",
                self._journal,
                run_id,
            )
            self._outdated = run_id
            client, run_id = self._open_run(run_id)
            run = client.get_run(run_id)
        self._outdated = None
        self._params = dict(run.data.params)
        self._num_sent = min(int(run.data.tags.get(FORWARDED, 0)), len(records))
        self._settled, self._pending = settled, records[self._num_sent :]
        self._target = (client, run_id)
        return self._target

    def _send(self, client: MlflowClient, run_id: str, records: Sequence[Record]) -> None:
        metrics: list[Metric] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for record in records:
            if record.kind == "metrics":
                metrics += [Metric(k, v, record.time_ms, record.step) for k, v in record.values.items()]
            elif record.kind == "tags":
                tags.update({name: value[:_LONGEST_VALUE] for name, value in record.values.items()})
            else:
                self._sort_params(record.values, params, tags)
        for part in _parts([Param(k, v) for k, v in params.items()], _SMALL_BATCH):
            client.log_batch(run_id, params=part)
        for part in _parts(metrics, _BATCH):
            client.log_batch(run_id, metrics=part)
        for part in _parts([RunTag(k, v) for k, v in tags.items()], _SMALL_BATCH):
            client.log_batch(run_id, tags=part)
        num_sent = self._num_sent + len(records)
        client.log_batch(run_id, tags=[RunTag(FORWARDED, str(num_sent))])  # last: what it counts is stored
        self._params.update(params)
        self._num_sent = num_sent
        del self._pending[: len(records)]

    def _sort_params(self, values: Mapping[str, str], params: dict[str, str], tags: dict[str, str]) -> None:
        """MLflow's params cannot change; a setting that did becomes the tag `changed.<name>`."""
        for name, value in values.items():
            value = value[:_LONGEST_VALUE]
            known = self._params.get(name, params.get(name))
            if known is None:
                params[name] = value
            elif known != value:
                tags[f"changed.{name}"] = value


class MlflowForwarder:
    """A thread that keeps a run up to a growing journal.

    It may live in any process that sees the journal, preferably not in one that trains. `open_run` is called in the
    thread, and again after failures, so MLflow may be down at the start.
    """

    def __init__(
        self,
        journal: Path,
        open_run: OpenRun,
        poll_s: float = 1.0,
        longest_pause_s: float = 30.0,
    ) -> None:
        self._journal = journal
        self._copy = JournalCopy(journal, open_run)
        self._poll_s = poll_s
        self._longest_pause_s = longest_pause_s
        self._failure: str | None = None
        self._stop = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="mlflow-forwarder", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 30.0) -> int:
        """Send what is settled, for at most `timeout_s`. Returns how many journal lines stay unsent."""
        self._deadline = time.monotonic() + timeout_s
        self._stop.set()
        self._thread.join(timeout_s + 1.0)
        unsent, num_waiting = self._copy.left()
        if unsent:
            logger.warning(
                "%d journal lines have not reached MLflow (%s); they stay in %s for the next run, or svitt rebuild",
                unsent,
                self._failure or "it is slow",
                self._journal,
            )
        if num_waiting:
            logger.warning(
                "%d journal lines past the last checkpoint stay in %s: a resumed stage computes them again, and MLflow "
                "gets those",
                num_waiting,
                self._journal,
            )
        return unsent

    def _run(self) -> None:
        pause_s = self._poll_s
        while True:
            is_last_round = self._stop.is_set()
            try:
                self._copy.send()
                if self._failure is not None:
                    logger.info("MLflow is back; the journal is being caught up")
                self._failure, pause_s = None, self._poll_s
                if is_last_round:
                    return
            except Exception as error:  # whatever MLflow raises must not end the thread
                if self._failure is None:
                    logger.warning(
                        "MLflow does not take points (%s); training goes on, will retry", brief(error)
                    )
                self._failure = brief(error)
                pause_s = min(2 * pause_s, self._longest_pause_s)
            if time.monotonic() > self._deadline:
                return
            if self._stop.is_set():
                time.sleep(min(pause_s, 0.5))
            else:
                self._stop.wait(pause_s)


def _all_stand_in(latest: Sequence[Metric], records: Sequence[Record], names: Collection[str]) -> bool:
    """Whether the newest point of each of these metrics of a run stands in its journal. Points that were computed again
    would be the newest: nobody sends more before having looked here.
    """
    known = {
        (name, r.step, r.time_ms, _as_stored(value))
        for r in records
        if r.kind == "metrics"
        for name, value in r.values.items()
    }
    return all((m.key, m.step, m.timestamp, _as_stored(m.value)) in known for m in latest if m.key in names)


def _as_stored(value: float) -> float | str:
    if math.isnan(value):
        return "nan"
    return math.copysign(_LARGEST, value) if math.isinf(value) else value


def _parts(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))
