"""A stop is a file; signals ask for it once, and leave the second time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import small_run

from jobs.stop import ask_to_stop, leaving_on_signals, stop_reason


def test_a_stop_names_its_reason(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    assert stop_reason(run) is None
    ask_to_stop(run, "signal")
    assert stop_reason(run) == "signal"
    run.stop_file.write_text("")
    assert stop_reason(run) == "unknown"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_handler_of_before_comes_back(number: int) -> None:
    before, asked = signal.getsignal(number), []
    with leaving_on_signals(asked.append):
        os.kill(os.getpid(), number)
        assert asked == [signal.Signals(number).name]
    assert signal.getsignal(number) is before


def test_the_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal; from jobs.stop import leaving_on_signals\n"
        "with leaving_on_signals(lambda name: print(name, flush=True)):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "SIGTERM\n"
    assert "leaving at once" in done.stderr
