"""A local cluster: tasks, jobs, training inside a job, and its end when its owner is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from infra.ray_cluster import _reachable, _remove_old_clusters
from infra.ray_jobs import ClusterError, Jobs
from infra.reaper import MARK_NAME, marked_processes, reap

pytestmark = pytest.mark.ray
HERE = str(Path(__file__).parent)
CASES = str(Path(__file__).parent / "ray_cases.py")


@dataclass(frozen=True)
class Held:
    """A cluster that a process of its own has open; `pid` is that one's."""

    pid: int
    address: str
    jobs: Jobs


@pytest.fixture(scope="module")
def cluster() -> Iterator[Held]:
    # The cluster's processes find the test's functions by PYTHONPATH.
    with subprocess.Popen(
        [sys.executable, CASES, "hold"],
        env={**os.environ, "PYTHONPATH": HERE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        told = json.loads(owner.stdout.readline())
        yield Held(owner.pid, told["address"], Jobs(told["url"]))
    assert owner.returncode == 0


def test_of_ended_clusters_only_the_newest_folders_are_kept_and_a_dangling_link_is_no_obstacle(
    tmp_path: Path,
) -> None:
    for age_s, name in enumerate(("999999991", "999999992", "session_old", "999999993", str(os.getpid()))):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9 - age_s, 1e9 - age_s))
    (tmp_path / "session_latest").symlink_to(tmp_path / "gone")
    _remove_old_clusters(tmp_path, keep=2)
    kept = {"999999991", "999999992", str(os.getpid()), "session_latest"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_the_processes_of_a_cluster_do_not_share_the_group_that_a_terminal_interrupts(cluster: Held) -> None:
    family = psutil.Process(cluster.pid).children(recursive=True)
    names = []
    for process in family:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == os.getpgid(cluster.pid):
                names.append(process.name())
    assert len(family) > 5
    assert names == []


def test_a_cluster_of_one_machine_starts_neither_an_autoscaler_nor_a_sender_of_lines(cluster: Held) -> None:
    lines = []
    for process in psutil.Process(cluster.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(" ".join(process.cmdline()))
    assert any("raylet" in line for line in lines)
    assert [line for line in lines if "monitor.py" in line] == []


def test_tasks_come_back_with_their_index_survive_a_death_and_an_exception_names_its_item(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, CASES, "map", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": HERE},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["squares"] == [[i, i * i] for i in range(6)]
    assert (tmp_path / "marker").exists()
    assert told["survived"] == [[0, "survived"]]
    assert told["failed"]["item"] == 3
    assert "clip 3: ValueError: a bad clip" in told["failed"]["words"]
    assert told["failed"]["is_cause_kept"]


def test_a_job_is_submitted_once_and_its_end_is_told(cluster: Held) -> None:
    command = [sys.executable, "-c", "import os; print('it is', os.environ['NAME']); raise SystemExit(3)"]
    first = cluster.jobs.submit_once("run-s0-a1", command, {"NAME": "me"}, {"stage": "0"})
    again = cluster.jobs.submit_once("run-s0-a1", "false")
    assert (first.is_new, again.is_new) == (True, False)
    seen: list[str] = []
    last = cluster.jobs.wait(
        "run-s0-a1", poll_s=0.1, on_poll=lambda state: seen.append(state.status), timeout_s=60
    )
    assert (last.status, last.exit_code, last.is_succeeded) == ("FAILED", 3, False)
    assert seen[-1] == "FAILED"
    assert "it is me" in cluster.jobs.logs("run-s0-a1")
    assert cluster.jobs.submit_once("run-s0-a1", command).status == "FAILED"
    assert cluster.jobs.find("nobody") is None


def test_a_stopped_job_ends(cluster: Held) -> None:
    cluster.jobs.submit_once("sleeper", ["sleep", "600"])
    while cluster.jobs.status("sleeper").status == "PENDING":
        time.sleep(0.1)
    assert cluster.jobs.stop("sleeper")
    assert cluster.jobs.wait("sleeper", poll_s=0.1, timeout_s=40).status == "STOPPED"
    assert not cluster.jobs.stop("sleeper")


def test_two_workers_train_inside_a_job_and_are_restarted_after_a_death(
    cluster: Held, tmp_path: Path
) -> None:
    cluster.jobs.submit_once("train", [sys.executable, CASES, "train", str(tmp_path), cluster.address])
    state = cluster.jobs.wait("train", poll_s=0.2, timeout_s=180)
    assert state.is_succeeded, cluster.jobs.logs("train")
    assert (tmp_path / "died").exists()
    assert json.loads((tmp_path / "seen.json").read_text()) == {
        "total": 3.0,
        "world_size": 2,
        "threads": 1,
        "local_rank": "0",
        "niceness": os.nice(0),
    }
    assert "rank 1: clip 17 has no frames" in (tmp_path / "error.txt").read_text()


def test_when_the_controlling_actor_dies_its_job_says_so_and_leaves_the_places_of_its_workers(
    cluster: Held, tmp_path: Path
) -> None:
    for verb in ("lose", "train"):  # the second one needs both CPUs again
        cluster.jobs.submit_once(f"{verb}-2", [sys.executable, CASES, verb, str(tmp_path), cluster.address])
        state = cluster.jobs.wait(f"{verb}-2", poll_s=0.2, timeout_s=180)
        assert state.is_succeeded, cluster.jobs.logs(f"{verb}-2")
    assert "training lose lost its controlling process" in (tmp_path / "lost.txt").read_text()
    assert (tmp_path / "seen.json").exists()


def test_a_job_address_that_does_not_answer_is_a_typed_error() -> None:
    with pytest.raises(ClusterError, match=r"connecting to the Ray cluster at http://127\.0\.0\.1:1 failed"):
        Jobs("http://127.0.0.1:1")


def test_an_address_that_nothing_listens_at_is_said_at_once() -> None:
    # Ray's own attempt to join takes minutes.
    with pytest.raises(ConnectionError, match=r"nothing answers at .*:1 \(.*refused"):
        _reachable("127.0.0.1:1")


def test_only_marked_processes_are_ended() -> None:
    marked = subprocess.Popen(["sleep", "60"], env={**os.environ, MARK_NAME: "abc"})
    other = subprocess.Popen(["sleep", "60"], env={**os.environ, MARK_NAME: "abcd"})
    try:
        assert marked_processes("abc", "/none/", spared=0) == [marked.pid]
        reap("abc", "/none/", owner=0)
        assert marked.wait(5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_owner_is_spared(tmp_path: Path) -> None:
    script = f"file = open({str(tmp_path / 'log')!r}, 'w'); input(); file.close()"
    owner = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    try:
        while marked_processes("abc", str(tmp_path), spared=0) != [owner.pid]:
            assert owner.poll() is None
            time.sleep(0.05)
        assert marked_processes("abc", str(tmp_path), spared=owner.pid) == []
    finally:
        owner.communicate(b"\n")


def listening_beyond_loopback(pid: int) -> list[str]:
    sockets = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end while it is looked at
            connections = process.net_connections("tcp")
            sockets += [(process.name(), c.laddr) for c in connections if c.status == "LISTEN"]
    loopback = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    return [f"{name} {address.ip}:{address.port}" for name, address in sockets if address.ip not in loopback]


def test_a_cluster_dies_with_its_owner_even_by_sigkill(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": HERE, "SVITT_TEST_FOLDER": str(tmp_path)}
    owner = subprocess.Popen([sys.executable, CASES, "own"], env=environment)
    deadline = time.monotonic() + 90
    try:
        while not (tmp_path / "ready").exists():
            assert owner.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert listening_beyond_loopback(owner.pid) == []
        family = psutil.Process(owner.pid).children(recursive=True)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert len(family) > 5
    _, alive = psutil.wait_procs(family, timeout=30)
    names = [process.name() for process in alive]
    for process in alive:
        process.kill()
    assert names == []
