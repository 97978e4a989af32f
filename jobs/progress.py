"""Progress a person can follow: one live line per task in a terminal, one plain line per interval elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressTask:
    """One task under way. `advance` may be called as often as wanted; plain output is held to one line per interval."""

    def __init__(self, report: "ProgressReport", name: str, total: int, live: tuple[Progress, TaskID] | None):
        self._report, self._name, self._total, self._live = report, name, total, live
        self._done = 0
        self._last_line_s = report.clock()
        # Time left is judged from the first count on: what came before it was starting up, not work.
        self._first: tuple[float, int] | None = None

    def advance(self, by: int = 1, note: str = "") -> None:
        self.set(self._done + by, note)

    def set(self, done: int, note: str = "") -> None:
        """Moves to `done` of the total (back, when work is repeated); `note` is shown beside the count."""
        self._done = done
        now_s = self._report.clock()
        if self._first is None or done < self._first[1]:
            self._first = (now_s, done)
        if self._live is not None:
            progress, task = self._live
            progress.update(task, completed=done, note=note)
            return
        if now_s - self._last_line_s >= self._report.interval_s:
            self._last_line_s = now_s
            self._line(now_s - self._first[0], done - self._first[1], note)

    def _line(self, elapsed_s: float, num_since: int, note: str) -> None:
        left = f"{elapsed_s / num_since * (self._total - self._done):.0f} s" if num_since else "?"
        self._report.say(f"{self._name}: {self._done}/{self._total} {note} eta {left}".replace("  ", " "))


class ProgressReport:
    """Where progress goes. `clock` is monotonic seconds; `interval_s` spaces the plain lines."""

    def __init__(
        self, console: Console, clock: Callable[[], float] = time.monotonic, interval_s: float = 10.0
    ) -> None:
        self.console, self.clock, self.interval_s = console, clock, interval_s

    def say(self, line: str) -> None:
        """One line that stays, word for word, whatever the output is."""
        self.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[ProgressTask]:
        """A task of `total` items; its bar disappears when it ends, so that the summary line can stand alone."""
        if not self.console.is_terminal:
            yield ProgressTask(self, name, total, None)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=total, note="")
            yield ProgressTask(self, name, total, (progress, task))
