"""Where the time went, by hand: one run with a kill, a restart and a pause."""

from pathlib import Path

import pytest
from small_runs import small_run

from infra.journal import Journal
from infra.ledger import Ledger
from jobs.goodput import Goodput, goodput
from jobs.run_dir import RunDir


class Clock:
    """A wall clock that stands where it is put."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def interval(
    journal: Journal, clock: Clock, at_s: float, step: int, busy_s: float, wait_s: float = 0.0
) -> None:
    clock.now_s = at_s
    journal.metrics(step, {"train/loss": 1.0, "perf/busy_s": busy_s, "perf/wait_s": wait_s})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return small_run(tmp_path)


def killed_and_restarted(run: RunDir, clock: Clock) -> Ledger:
    ledger = Ledger(run.ledger_file, clock=clock)
    clock.now_s = 1000.0
    ledger.record_run(controllers=1)
    clock.now_s = 1002.0
    ledger.record_attempt(1, "job-1")
    clock.now_s = 1008.0
    ledger.record_start(1, 1)
    first = Journal(run.journal(1), 0, clock, generation=1)
    interval(first, clock, 1020.0, 10, busy_s=8.0, wait_s=2.0)  # begun at 1010: 8 s after its submission
    first.metrics(10, {"perf/save_s": 1.0})
    interval(first, clock, 1031.0, 20, busy_s=10.0)
    first.close()
    # Killed at once; the next start has step 10 and its first step at 1040, 9 s after the last sign of life.
    clock.now_s = 1036.0
    ledger.record_start(1, 1, died_at=20)
    second = Journal(run.journal(1), 10, clock, generation=2)
    interval(second, clock, 1050.0, 20, busy_s=10.0)
    second.close()
    clock.now_s = 1051.0
    ledger.record_stage(1, "trained")
    clock.now_s = 1056.0
    ledger.record_stage(1, "done")
    return ledger


def test_every_second_of_a_killed_and_restarted_run_is_told(run: RunDir) -> None:
    killed_and_restarted(run, Clock())
    assert goodput(run) == Goodput(
        productive_s=18.0,
        data_wait_s=2.0,
        save_s=1.0,
        evaluation_s=5.0,
        start_s=8.0,
        restart_s=9.0,
        lost_s=10.0,
        down_s=0.0,
        # From the controller to the first stage 2 s, and from the last interval to the last checkpoint 1 s.
        other_s=3.0,
    )
    assert goodput(run).wall_s == 56.0


def test_the_line_shows_the_share_and_the_larger_parts_first(run: RunDir) -> None:
    killed_and_restarted(run, Clock())
    assert goodput(run).line() == (
        "goodput 32 % of 0 min 56 s: lost 18 % (10 s), restart 16 % (9 s), start 14 % (8 s), evaluation 9 % (5 s), "
        "other 5 % (3 s), data wait 4 % (2 s), save 2 % (1 s)"
    )


def test_time_without_a_controller_is_down_and_not_restart(run: RunDir) -> None:
    clock = Clock()
    ledger = Ledger(run.ledger_file, clock=clock)
    clock.now_s = 1000.0
    ledger.record_run(controllers=1)
    ledger.record_attempt(1, "job-1")
    ledger.record_start(1, 1)
    first = Journal(run.journal(1), 0, clock, generation=1)
    interval(first, clock, 1010.0, 10, busy_s=10.0)
    first.close()
    clock.now_s = 5000.0
    ledger.record_run(controllers=2)
    clock.now_s = 5001.0
    ledger.record_attempt(1, "job-2")
    clock.now_s = 5004.0
    ledger.record_start(1, 2, died_at=10)
    second = Journal(run.journal(1), 10, clock, generation=2)
    interval(second, clock, 5016.0, 20, busy_s=10.0)
    second.close()
    found = goodput(run)
    assert (found.down_s, found.restart_s, found.productive_s, found.lost_s) == (3990.0, 6.0, 20.0, 0.0)
    assert found.wall_s == 4016.0


def test_a_run_that_has_not_started_has_spent_nothing(run: RunDir) -> None:
    assert goodput(run) == Goodput()
    assert goodput(run).share == 0.0
