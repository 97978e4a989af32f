"""One holder at a time: on this host, on another one, alive, dead and silent."""

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from infra.lease import Lease, LeaseHeldError, LeaseLostError


def hold(path: Path, told: Connection) -> None:
    with Lease(path):
        told.send(os.getpid())
        time.sleep(60)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "driver"


def test_a_lease_is_free_again_after_its_block(path: Path) -> None:
    for _ in range(2):
        with Lease(path) as lease:
            assert lease.holder() is not None
            assert lease.holder().pid == os.getpid()  # type: ignore[union-attr]
    assert not path.exists()


def test_another_process_is_refused_and_told_who_holds_it_until_that_one_is_killed(path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    child = fork.Process(target=hold, args=(path, there))
    child.start()
    pid = here.recv()
    with pytest.raises(LeaseHeldError, match=rf"driven by process {pid} on .*svitt stop"), Lease(path):
        pass
    os.kill(pid, signal.SIGKILL)
    child.join()
    with Lease(path) as lease:
        assert lease.holder().pid == os.getpid()  # type: ignore[union-attr]


def foreign(path: Path, beat: int, host: str = "elsewhere", generation: int = 3) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"host": host, "pid": 1, "generation": generation, "beat": beat}))


def test_a_holder_on_another_host_that_moves_is_left_alone(path: Path) -> None:
    foreign(path, 1)
    with (
        pytest.raises(LeaseHeldError, match="process 1 on elsewhere"),
        Lease(path, sleep=lambda s: foreign(path, 2)),
    ):
        pass
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_holder_on_another_host_that_stands_still_is_replaced_after_a_while(path: Path) -> None:
    foreign(path, 1)
    slept: list[float] = []
    with Lease(path, beat_s=4.0, stale_s=10.0, sleep=slept.append) as lease:
        assert lease.holder().pid == os.getpid()  # type: ignore[union-attr]
        assert lease.holder().generation == 4  # type: ignore[union-attr]
    assert slept == [2.0] * 6  # five while it is watched, and one to see who else took it


def test_of_two_hosts_that_find_a_holder_silent_at_the_same_time_the_last_to_write_has_it(
    path: Path,
) -> None:
    foreign(path, 1)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 6:
            foreign(path, 0, host="a third", generation=4)

    with pytest.raises(LeaseHeldError, match="process 1 on a third"), Lease(path, 4.0, 10.0, sleep=sleep):
        pass
    assert json.loads(path.read_text())["host"] == "a third"


def test_a_clock_that_jumps_makes_nobody_silent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(path, 1)
    os.utime(path, (0, 0))  # written, by its own account, decades ago
    beats = iter(range(2, 99))
    monkeypatch.setattr(time, "time", lambda: 1e12)
    with pytest.raises(LeaseHeldError), Lease(path, sleep=lambda seconds: foreign(path, next(beats))):
        pass


def test_a_holder_that_was_away_leaves_the_lease_to_who_took_it(path: Path) -> None:
    with Lease(path, beat_s=0.01) as lease:
        lease.require_held()
        foreign(path, 0, generation=2)
        with pytest.raises(LeaseLostError, match="taken over by process 1 on elsewhere"):
            lease.require_held()
        lease._thread.join(10)  # type: ignore[union-attr]  # it has seen that too, and beats no more
        assert json.loads(path.read_text())["host"] == "elsewhere"
    assert json.loads(path.read_text()) == {"host": "elsewhere", "pid": 1, "generation": 2, "beat": 0}


def test_a_lease_whose_file_is_gone_is_lost(path: Path) -> None:
    with Lease(path, beat_s=60) as lease:
        path.unlink()
        with pytest.raises(LeaseLostError, match="has ended since"):
            lease.require_held()


def test_a_holder_on_another_host_that_leaves_is_not_waited_for(path: Path) -> None:
    foreign(path, 1)
    with Lease(path, sleep=lambda s: path.unlink()) as lease:
        assert lease.holder() is not None


def test_a_torn_file_is_no_holder(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"host": "else')
    with Lease(path) as lease:
        assert lease.holder() is not None


def test_the_counter_moves_while_it_is_held(path: Path) -> None:
    with Lease(path, beat_s=0.01) as lease:
        deadline_s = time.monotonic() + 10
        while lease.holder() is None or lease.holder().beat < 3:  # type: ignore[union-attr]
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
