"""What became of the rows of an annotation file: nothing is dropped without a word."""

from collections import Counter
from dataclasses import dataclass, field

MAX_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What became of the rows of a file.

    rows = kept + the counts of bad_row, end_before_start, outside_video, empty_caption and duplicate.
    negative_start_clamped and end_beyond_video_clamped count rows that were changed and kept.
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
    """Counts while reading; `report` sums up."""

    def __init__(self) -> None:
        self.rows = 0
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def count(self, reason: str, line_number: int, detail: str) -> None:
        """One row of which `reason` is to be said."""
        self._counts[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(f"line {line_number}: {detail}")

    def report(self, num_kept: int) -> ReadReport:
        """The sum."""
        return ReadReport(self.rows, num_kept, dict(self._counts), self._examples)


class RowError(Exception):
    """A row that cannot be used: reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail
