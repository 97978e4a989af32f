"""The chain under fire: `python -m tests.soak.chain_faults --folder SCRATCH [--only NAME ...]`.

submits: fifty `svitt submit` of one recipe at once, one training. mlflow: the tracking server is down at the start,
comes, is killed in the middle, and comes back: one set of runs, every point once. head: a cluster with token
authentication whose head is killed in stage 2 and started again. All have to end with the weights of the calm run.
"""

import argparse
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mlflow.tracking import MlflowClient

from jobs.tracking import fact_name
from tests.infra.mlflow_server import MlflowServer
from tests.jobs.whole_runs import WholeRun, prepare_tiny

STEPS = 20
OVERRIDES = (
    f"stages.0.num_steps={STEPS}",
    f"stages.1.num_steps={STEPS}",
    "checkpoint.every_steps=4",
    "cluster.max_failures=20",
)


def require_same(job: WholeRun, calm: WholeRun) -> None:
    for stage in (1, 2):
        if job.losses(stage) != calm.losses(stage) or job.weights_hash(stage) != calm.weights_hash(stage):
            raise SystemExit(f"{job.name}: stage {stage} is not that of the calm run")
    print(f"{job.name}: losses and weights are those of the calm run", flush=True)


def fifty_submits(folder: Path, calm: WholeRun, num: int = 50) -> None:
    commands = [WholeRun(folder, "submits", OVERRIDES, num_commands=100 * n) for n in range(num)]
    for command in commands:
        command.mark = commands[0].mark
    began_s = time.monotonic()
    try:
        for command in commands:
            command.start()
        codes = [command.wait(3000) for command in commands]
    finally:
        commands[0].kill_everything()
    state = commands[0].state
    print(
        f"{num} submits at once ended after {time.monotonic() - began_s:.0f} s with {sorted(set(codes))}; controllers "
        f"{state.facts['controllers']}, attempts {[state.stage(n).attempts for n in (1, 2)]}, starts "
        f"{[len(state.stage(n).starts) for n in (1, 2)]}",
        flush=True,
    )
    if set(codes) != {0} or [len(state.stage(n).starts) for n in (1, 2)] != [1, 1]:
        raise SystemExit("it was trained more than once, or not at all")
    require_same(commands[0], calm)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def tracking_down(folder: Path, calm: WholeRun) -> None:
    server = MlflowServer(folder)
    job = WholeRun(folder, "mlflow", (*OVERRIDES, f"tracking.uri={server.uri}"))
    try:
        job.start()
        job.wait_until(lambda: job.step(1) >= 8)
        server.start()
        job.wait_until(lambda: fact_name(2) in job.state.facts or job.step(2) >= STEPS - 4)
        server.kill()
        job.wait_until(lambda: job.step(2) >= STEPS - 2 or job.current_stage() != 2)
        code = job.wait(900)
        server.start()
        time.sleep(20)
        job.start("resume")
        code = job.wait(900)
        if code != 0:
            raise SystemExit(job.tails())
        require_same(job, calm)
        client = MlflowClient(tracking_uri=server.uri)
        experiment = client.get_experiment_by_name("svitt-ego")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        print(f"mlflow: {len(runs)} runs, states {sorted({run.info.status for run in runs})}", flush=True)
        for number in (1, 2):
            history = client.get_metric_history(job.state.facts[fact_name(number)], "train/loss")
            steps = [point.step for point in history]
            in_order = [point.step for point in sorted(history, key=lambda point: point.timestamp)]
            if sorted(steps) != list(range(1, STEPS + 1)) or in_order != sorted(steps):
                raise SystemExit(f"mlflow: stage {number} has points at {steps}")
        if len(runs) != 3:
            raise SystemExit("mlflow: not one set of runs")
    finally:
        job.kill_everything()
        server.kill()


def restarted_head(folder: Path, calm: WholeRun) -> None:
    """On `ray start --head` with token authentication; the run is submitted to it, and again after its death."""
    token = secrets.token_hex(32)
    ports = {"port": free_port(), "dashboard-port": free_port(), "dashboard-agent-listen-port": free_port()}
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": ""}
    job = WholeRun(folder, "head", OVERRIDES, environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
    heads: list[subprocess.Popen[bytes]] = []

    def start_head() -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
        command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        command += [f"--temp-dir=/tmp/svitt-head-{os.getpid()}", "--object-store-memory=268435456"]
        # Jobs run the `python` that the head finds, as in an activated environment.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        marks = {"SVITT_TEST_MARK": job.mark, "OMP_NUM_THREADS": "1", "PATH": path}
        environment = {**os.environ, **variables, **marks}
        with (folder / "head.log").open("ab") as log:
            heads.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s:
            try:
                socket.create_connection(("127.0.0.1", ports["dashboard-port"]), 1).close()
                time.sleep(5)
                return
            except OSError:
                time.sleep(0.5)
        raise SystemExit("the head did not come up")

    def wait_for(is_so: Callable[[], bool], seconds: float = 600) -> None:
        deadline_s = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline_s:
                raise SystemExit(f"head: not so\n{job.tails()}")
            time.sleep(0.02)

    try:
        start_head()
        job.start("submit", "--address", url)
        if job.wait() != 0:
            raise SystemExit(job.tails())
        print(f"head: {job.log.read_text().strip().splitlines()[-1]}", flush=True)
        wait_for(lambda: job.step(2) >= 6)
        job.kill_everything()
        heads[-1].wait()
        start_head()
        job.start("submit", "--address", url)
        if job.wait() != 0:
            raise SystemExit(job.tails())
        wait_for(lambda: job.current_stage() == 0)
        print(f"head: controllers {job.state.facts['controllers']}", flush=True)
        require_same(job, calm)
    finally:
        job.kill_everything()


PARTS: dict[str, Callable[[Path, WholeRun], None]] = {
    "submits": fifty_submits,
    "mlflow": tracking_down,
    "head": restarted_head,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    prepare_tiny(options.folder)
    calm = WholeRun(options.folder, "calm-chain", OVERRIDES)
    if not calm.run.recipe_file.exists() or calm.current_stage() != 0:
        calm.start()
        if calm.wait() != 0:
            raise SystemExit(calm.tails())
    for name in options.only:
        PARTS[name](options.folder, calm)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
