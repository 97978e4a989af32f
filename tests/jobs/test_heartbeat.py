"""Signs of life survive the process; silence is told once, with stacks."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.heartbeat import Beat, HangWatch, Heartbeat, describe_process, last_step, read_beats


def test_the_newest_beat_of_each_rank_is_read_in_their_order(tmp_path: Path) -> None:
    for rank in (1, 0):
        heart = Heartbeat(tmp_path / "beats" / f"rank-{rank}", 4, rank, clock=lambda: 12.3456)
        heart.beat(100_000, "save")
        heart.beat(7 + rank, "step")
        heart.close()
    first, second = read_beats(tmp_path / "beats")
    assert (first.generation, first.rank, first.step, first.phase, first.time_s) == (4, 0, 7, "step", 12.346)
    assert (second.rank, second.step, second.pid) == (1, 8, os.getpid())


def test_the_last_step_is_that_of_the_rank_furthest_on_in_that_generation(tmp_path: Path) -> None:
    for rank, (generation, step) in enumerate([(3, 7), (3, 8), (2, 50)]):
        heart = Heartbeat(tmp_path / f"rank-{rank}", generation, rank)
        heart.beat(step, "step")
        heart.close()
    assert last_step(tmp_path, 3) == 8
    assert last_step(tmp_path, 2) == 50
    assert last_step(tmp_path, 1) is None
    assert last_step(tmp_path / "nothing", 1) is None


def test_a_torn_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rank-0").write_text('{"generation": 1, "ra')
    assert read_beats(tmp_path) == []


def test_a_killed_process_leaves_its_last_sign(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from jobs.heartbeat import Heartbeat\n"
        "Heartbeat(Path(sys.argv[1]), 1, 0).beat(31, 'step'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "rank-0")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert last_step(tmp_path, 1) == 31


def wait_for(file: Path) -> None:
    deadline_s = time.monotonic() + 30
    while not (file.is_file() and "Thread" in file.read_text()):
        assert time.monotonic() < deadline_s, "nothing was written"
        time.sleep(0.01)


def test_silence_writes_the_stacks_of_all_threads_once_and_names_the_ranks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heart = Heartbeat(tmp_path / "beats" / "rank-0", 1, 0)
    heart.beat(12, "step")
    stacks = tmp_path / "logs" / "rank-0.stacks"
    with caplog.at_level(logging.ERROR), HangWatch(heart, stacks, patience_s=0.05, poll_s=0.01):
        wait_for(stacks)
        time.sleep(0.3)
    text = stacks.read_text()
    assert text.count("no progress for") == 1
    assert "test_silence_writes_the_stacks" in text
    assert "rank 0 step 12 (" in text
    assert "no progress for" in caplog.text


def test_a_heart_that_beats_is_left_alone(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "beats" / "rank-0", 1, 0)
    stacks = tmp_path / "rank-0.stacks"
    with HangWatch(heart, stacks, patience_s=5.0, poll_s=0.01):
        for step in range(20):
            heart.beat(step, "step")
            time.sleep(0.01)
    assert not stacks.exists()


def test_a_stopped_process_and_one_that_is_gone_are_called_so() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    beat = Beat(1, 1, 5, "step", 0.0, socket.gethostname()[:64], child.pid)
    try:
        child.send_signal(signal.SIGSTOP)
        deadline_s = time.monotonic() + 10
        while describe_process(beat) != "stopped" and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert describe_process(beat) == "stopped"
    finally:
        child.kill()
        child.wait()
    assert describe_process(beat) == "gone"
