"""A real server on SQLite is killed while it stores points; afterwards it holds each of them once, in order."""

import contextlib
import random
import sqlite3
import threading
import time
from pathlib import Path

from infra.journal import Journal, valid_records
from infra.mlflow_forwarder import JournalCopy
from infra.mlflow_tracker import MlflowRuns
from infra.runtime import prepare_process
from tests.infra.fake_mlflow import points_of
from tests.infra.mlflow_server import MlflowServer

NUM_STEPS, NUM_METRICS = 1500, 20
prepare_process()  # MLflow's own retries would go on for minutes


def num_stored(database: Path) -> int:
    # Not read-only: whoever opens it after a kill in mid-transaction has to roll that back.
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=rw", uri=True)) as connection:
        return connection.execute("SELECT COUNT(*) FROM metrics").fetchone()[0]


def test_a_server_killed_in_the_middle_of_a_batch_ends_with_every_point_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", clock=lambda: time.time())
    for step in range(1, NUM_STEPS + 1):
        journal.metrics(step, {f"m{i}": step + i / 100 for i in range(NUM_METRICS)})
    journal.close()
    draw, runs = random.Random(0), []

    def open_run(outdated: str | None = None) -> tuple:
        runs[:] = runs or [MlflowRuns(server.uri, "outage", tmp_path / "artifacts")]
        return runs[0].client, runs[0].ensure("outage", "stage 1")

    copy = JournalCopy(journal.path, open_run)
    kills_at: list[int] = []
    with MlflowServer(tmp_path) as server:
        for round_ in range(3):

            def send_until_it_breaks() -> None:
                with contextlib.suppress(Exception):
                    copy.send()

            before = num_stored(server.database)
            sender = threading.Thread(target=send_until_it_breaks)
            sender.start()
            while num_stored(server.database) < before + 1000 * (round_ + 1) and sender.is_alive():
                time.sleep(0.005)
            time.sleep(draw.uniform(0.0, 0.1))
            server.kill()
            sender.join()
            kills_at.append(num_stored(server.database))
            server.start()
        JournalCopy(journal.path, open_run).send()
        client, run_id = open_run()
        histories = {f"m{i}": client.get_metric_history(run_id, f"m{i}") for i in range(NUM_METRICS)}
    total = NUM_STEPS * NUM_METRICS
    assert all(0 < number < total for number in kills_at), f"killed behind the end: {kills_at} of {total}"
    expected = points_of(valid_records(journal.path))
    for name, history in histories.items():
        found = [(m.key, m.step, m.timestamp, str(m.value)) for m in sorted(history, key=lambda m: m.step)]
        assert found == [point for point in expected if point[0] == name]
