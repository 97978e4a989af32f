"""Training beside an MLflow that is away: `python -m tests.soak.tracking_outage --minutes 10 [--folder SCRATCH]`.

A process takes steps of about 50 ms of CPU work and journals each; this one forwards the journal to a real server on
loopback. The server is killed while it stores points, stays away, and comes back, several times, for the given minutes
in all. Printed are the median step with and without it, their ratio for each pair of windows, and whether MLflow ends
with every point once and in order.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from mlflow.tracking import MlflowClient

from infra.journal import Journal, SettledRecords, valid_records
from infra.mlflow_forwarder import MlflowForwarder
from infra.mlflow_tracker import MlflowRuns
from infra.runtime import prepare_process
from tests.infra.fake_mlflow import points_of
from tests.infra.mlflow_server import MlflowServer

STEP_S, SAVE_EVERY, NUM_METRICS, NUM_OUTAGES = 0.05, 10, 10, 4


def take_steps(folder: Path) -> None:
    """Works until a file named `stop` appears; writes when each step ended, its seconds by clock and of CPU."""
    num_rounds = 10_000
    while _work_s(num_rounds) < STEP_S:
        num_rounds = int(num_rounds * 1.1)
    journal, step = Journal(folder / "journal.jsonl", resume_step=0), 0
    with (folder / "steps.jsonl").open("w") as steps:
        while not (folder / "stop").exists():
            step += 1
            began_s, began_cpu_s = time.monotonic(), time.process_time()
            _work_s(num_rounds)
            journal.metrics(step, {f"train/m{i}": step + i / 100 for i in range(NUM_METRICS)})
            journal.flush()
            if step % SAVE_EVERY == 0:
                journal.saved(step)
            ended_s = time.monotonic()
            steps.write(json.dumps([ended_s, ended_s - began_s, time.process_time() - began_cpu_s]) + "\n")
    journal.saved(step)
    journal.close()


def _work_s(num_rounds: int) -> float:
    began_s, total = time.process_time(), 0
    for i in range(num_rounds):
        total += i * i
    return time.process_time() - began_s


def soak(folder: Path, minutes: float) -> int:
    journal = folder / "journal.jsonl"
    window_s = 60 * minutes / NUM_OUTAGES
    runs: list[MlflowRuns] = []
    windows: list[tuple[str, float, float]] = []

    def open_run(outdated: str | None = None) -> tuple[MlflowClient, str]:
        runs[:] = runs or [MlflowRuns(server.uri, "outage", folder / "artifacts")]
        return runs[0].client, runs[0].ensure("outage", "stage 1")

    with MlflowServer(folder) as server:
        open_run()  # made before two threads could make it
        steps = subprocess.Popen([sys.executable, "-m", "tests.soak.tracking_outage", "--steps", str(folder)])
        forwarder = MlflowForwarder(journal, open_run, poll_s=1.0, longest_pause_s=5.0)
        try:
            for number in range(NUM_OUTAGES):
                wait_until_caught_up(open_run, journal)
                windows.append(window("with", min(window_s, 30.0)))
                kill_mid_write(server, open_run)
                windows.append(window("without", window_s))
                server.start()
                print(f"outage {number + 1} of {NUM_OUTAGES}, {window_s:.0f} s, is over", flush=True)
            wait_until_caught_up(open_run, journal)
        finally:
            (folder / "stop").touch()
            steps.wait(60)
        num_unsent = forwarder.close(60)
        client, run_id = open_run()
        is_whole = num_unsent == 0 and holds_every_point(client, run_id, journal)
    print_ratio(folder, windows)
    print(f"all {len(points_of(valid_records(journal)))} points are there once and in order: {is_whole}")
    return 0 if is_whole else 1


def window(kind: str, seconds: float) -> tuple[str, float, float]:
    began_s = time.monotonic()
    time.sleep(seconds)
    return kind, began_s, time.monotonic()


def wait_until_caught_up(open_run: object, journal: Path) -> None:
    """Until MLflow has all but the newest few seconds."""
    assert callable(open_run)
    while True:
        settled = SettledRecords(journal).read()
        if settled:
            client, run_id = open_run()
            tags = client.get_run(run_id).data.tags
            if len(settled) - int(tags.get("svitt.forwarded", 0)) <= 10 * SAVE_EVERY:
                return
        time.sleep(1.0)


def kill_mid_write(server: MlflowServer, open_run: object) -> None:
    """SIGKILL a few milliseconds after a request began to change the store."""
    log = server.database.with_name(server.database.name + "-journal")
    end_s = time.monotonic() + 30
    while not log.exists() and time.monotonic() < end_s:  # SQLite has it during a transaction
        time.sleep(0.0005)
    was_writing = log.exists()
    server.kill()
    print(f"killed {'in the middle of a transaction' if was_writing else 'between two requests'}", flush=True)


def holds_every_point(client: MlflowClient, run_id: str, journal: Path) -> bool:
    expected = points_of(valid_records(journal))
    for i in range(NUM_METRICS):
        name = f"train/m{i}"
        found = [(m.key, m.step, m.timestamp, str(m.value)) for m in client.get_metric_history(run_id, name)]
        if found != [point for point in expected if point[0] == name]:
            print(f"{name} differs: {len(found)} points")
            return False
    return True


def print_ratio(folder: Path, windows: list[tuple[str, float, float]]) -> None:
    """Of the time on the clock, which other work on the machine sways, and of the CPU time of the step's process."""
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    for column, name in ((1, "clock"), (2, "CPU")):
        medians = [median(s[column] for s in steps if a <= s[0] - s[1] and s[0] <= b) for _, a, b in windows]
        up, down = medians[::2], medians[1::2]
        ratios = sorted(without / with_ for with_, without in zip(up, down, strict=True))
        print(
            f"median step by {name}: with the server {1e3 * median(up):.1f} ms, without {1e3 * median(down):.1f} ms; "
            f"ratio {median(ratios):.3f}, of {len(ratios)} pairs of windows {ratios[0]:.3f} to {ratios[-1]:.3f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the server is away in all")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--steps", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps is not None:
        take_steps(options.steps)
        return 0
    prepare_process()
    if options.folder is not None:
        options.folder.mkdir(parents=True)  # a new one: the journal must be this run's
        return soak(options.folder, options.minutes)
    with tempfile.TemporaryDirectory() as folder:
        return soak(Path(folder), options.minutes)


if __name__ == "__main__":
    raise SystemExit(main())
