"""Plain progress: one line per interval at most, whatever calls it."""

import io

from rich.console import Console

from jobs.progress import ProgressReport


class Plain:
    """A report into memory with a clock that the test moves."""

    def __init__(self, interval_s: float = 10.0) -> None:
        self.output, self.now_s = io.StringIO(), 0.0
        console = Console(file=self.output, force_terminal=False, width=40)
        self.report = ProgressReport(console, clock=lambda: self.now_s, interval_s=interval_s)

    def lines(self) -> list[str]:
        return self.output.getvalue().splitlines()


def test_there_is_at_most_one_line_per_interval() -> None:
    plain = Plain(interval_s=10)
    with plain.report.task("decoding", 1000) as task:
        for second in range(100):  # ten advances a second apart make an interval
            plain.now_s = float(second)
            task.advance()
    assert [line.split(" ")[1] for line in plain.lines()] == [
        f"{done}/1000" for done in (11, 21, 31, 41, 51, 61, 71, 81, 91)
    ]


def test_a_line_holds_name_count_note_and_the_time_left() -> None:
    plain = Plain(interval_s=10)
    with plain.report.task("decoding", 100) as task:
        task.set(0)
        plain.now_s = 20.0
        task.set(25, "2 rejected")
    # 25 took 20 s, so the other 75 take 60 s
    assert plain.lines() == ["decoding: 25/100 2 rejected eta 60 s"]


def test_the_time_left_leaves_out_what_it_took_to_start() -> None:
    plain = Plain(interval_s=10)
    with plain.report.task("training", 100) as task:
        plain.now_s = 50.0
        task.set(10)  # the first count, possibly of an earlier attempt
        plain.now_s = 60.0
        task.set(30)  # 20 in 10 s, so the other 70 take 35 s
    assert plain.lines() == ["training: 10/100 eta ?", "training: 30/100 eta 35 s"]


def test_the_time_left_is_judged_anew_when_work_is_repeated() -> None:
    plain = Plain(interval_s=10)
    with plain.report.task("training", 20) as task:
        task.set(13)
        plain.now_s = 50.0
        task.set(10)
        plain.now_s = 60.0
        task.set(15)  # 5 in 10 s
    assert plain.lines() == ["training: 10/20 eta ?", "training: 15/20 eta 10 s"]


def test_a_task_shorter_than_an_interval_prints_nothing() -> None:
    plain = Plain(interval_s=10)
    with plain.report.task("decoding", 3) as task:
        for _ in range(3):
            plain.now_s += 3.0
            task.advance()
    assert plain.lines() == []


def test_a_line_said_is_not_held_back_wrapped_or_marked_up() -> None:
    plain = Plain()
    long = "71.2 [66.4, 75.6] and [bold]no markup[/bold] in " + "a long line " * 8
    plain.report.say(long)
    plain.report.say("next")
    assert plain.lines() == [long, "next"]
