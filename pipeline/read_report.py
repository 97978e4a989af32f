"""What became of the rows of an annotation file: nothing is dropped without a word."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from pipeline.clip_table import ClipTable, ClipTableBuilder
from pipeline.errors import Reason

MAX_EXAMPLES = 5
RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What became of the rows of a file.

    rows = kept + the counts of bad_row, end_before_start, outside_video, empty_caption and duplicate. Any other
    reason counts rows that were changed, or say less than they could, and are kept.
    examples: reason -> first lines, "line 17: ...".
    """

    rows: int = 0
    kept: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Returns the report as text lines for a person."""
        out = [f"{self.rows} rows, {self.kept} kept"]
        for reason, count in sorted(self.counts.items()):
            out.append(f"{reason}: {count}")
            out.extend(f"    {example}" for example in self.examples.get(reason, []))
        return out


class RowCounter:
    """Counts while reading. `place` is what rows are called: line, entry."""

    def __init__(self, place: str = "line") -> None:
        self.rows = 0
        self._place = place
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def count(self, reason: str, number: int, detail: str) -> None:
        """One row of which `reason` is to be said."""
        self._counts[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(f"{self._place} {number}: {detail}")

    def report(self, num_kept: int) -> ReadReport:
        """The sum."""
        return ReadReport(self.rows, num_kept, dict(self._counts), self._examples)


class RowError(Exception):
    """A row that cannot be used: reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_rows(
    rows: Iterable[tuple[int, RowT | RowError]],
    add: Callable[[ClipTableBuilder, RowT, int, RowCounter], None],
    place: str = "line",
) -> tuple[ClipTable, ReadReport]:
    """The loop of every reader: rows with their number in the file to a table and a report.

    `add(builder, row, number, counter)` appends a row, or raises RowError; rows that repeat a clip are left out.
    """
    counter, builder, numbers = RowCounter(place), ClipTableBuilder(), array("q")
    for number, row in rows:
        counter.rows += 1
        try:
            if isinstance(row, RowError):
                raise row
            add(builder, row, number, counter)
        except RowError as error:
            counter.count(error.reason, number, error.detail)
            continue
        numbers.append(number)
    clips = builder.build()
    repeats = clips.repeats()
    for row in repeats.tolist():
        counter.count(Reason.DUPLICATE, numbers[row], f"clip {clips[row].clip_id} again")
    clips = clips.without(repeats)
    return clips, counter.report(len(clips))
