"""Reads and writes EgoClip annotation files (TAB separated, 11 columns, arXiv 2206.01670).

The reader goes line by line, keeps every row it can use, and counts every row it cannot, with its line
number: nothing is dropped without a word. Tag lists are parsed as integers and never evaluated.
"""

import csv
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.atomic import write_text_atomically
from pipeline.errors import DataError, Reason

COLUMNS = (
    "clip_idx",
    "video_uid",
    "video_dur",
    "narration_source",
    "narration_ind",
    "narration_time",
    "clip_start",
    "clip_end",
    "clip_text",
    "tag_verb",
    "tag_noun",
)
END_CLAMPED = "end_beyond_video_clamped"
MAX_EXAMPLES = 5
_TAGS = re.compile(r"\[\s*(?:\d+(?:\s*,\s*\d+)*\s*,?\s*)?\]")


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """One clip with its caption. Times are seconds in the whole video; verbs and nouns are class ids."""

    clip_id: str
    video_uid: str
    start_s: float
    end_s: float
    narration_s: float
    caption: str
    verbs: tuple[int, ...] = ()
    nouns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EgoClipRow:
    """One row of the file, field for column."""

    clip_idx: int
    video_uid: str
    video_dur: float
    narration_source: str
    narration_ind: int
    narration_time: float
    clip_start: float
    clip_end: float
    clip_text: str
    tag_verb: tuple[int, ...]
    tag_noun: tuple[int, ...]


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


def make_clip_id(video_uid: str, start_s: float, end_s: float, caption: str) -> str:
    """Returns an id that is stable over machines and safe as a file name in a tar of WebDataset samples."""
    uid = re.sub(r"[^A-Za-z0-9_-]", "_", video_uid)
    checksum = zlib.crc32(caption.encode())
    return f"{uid}_{round(start_s * 1000):09d}_{round(end_s * 1000):09d}_{checksum:08x}"


def make_record(
    video_uid: str,
    start_s: float,
    end_s: float,
    narration_s: float,
    caption: str,
    verbs: tuple[int, ...],
    nouns: tuple[int, ...],
) -> ClipRecord:
    """Builds a record with its id."""
    clip_id = make_clip_id(video_uid, start_s, end_s, caption)
    return ClipRecord(clip_id, video_uid, start_s, end_s, narration_s, caption, verbs, nouns)


def parse_tags(text: str) -> tuple[int, ...]:
    """Parses a tag list such as "[192, 115]"; empty text and "[]" give (). Raises ValueError otherwise."""
    text = text.strip()
    if not text:
        return ()
    if not _TAGS.fullmatch(text):
        raise ValueError(f"{text[:60]!r} is not a list of class numbers such as [192, 115]")
    return tuple(int(number) for number in re.findall(r"\d+", text))


class _Report:
    """Counts while reading."""

    def __init__(self) -> None:
        self.rows = self.kept = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def count(self, reason: str, line_number: int, detail: str) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(f"line {line_number}: {detail}")


class _RowError(Exception):
    """A row that cannot be used: reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_egoclip(path: Path) -> tuple[list[ClipRecord], ReadReport]:
    """Reads an EgoClip file into records and a report of everything that was not as it should be.

    Negative starts are set to 0, ends beyond the video to its end; rows that cannot be used are skipped;
    all are counted with line numbers. Raises DataError when there is no file or a column is missing.
    """
    report = _Report()
    records: list[ClipRecord] = []
    seen: set[str] = set()
    for line_number, cells, columns in _cells(path):
        report.rows += 1
        try:
            if cells is None:
                raise _RowError(Reason.BAD_ROW, "not UTF-8 text")
            record = _record(cells, columns, line_number, report)
            if record.clip_id in seen:
                raise _RowError(Reason.DUPLICATE, f"clip {record.clip_id} again")
        except _RowError as error:
            report.count(error.reason, line_number, error.detail)
            continue
        seen.add(record.clip_id)
        records.append(record)
    report.kept = len(records)
    return records, ReadReport(report.rows, report.kept, dict(report.counts), report.examples)


def format_egoclip(rows: Iterable[EgoClipRow]) -> str:
    """Returns the text of an EgoClip file; TAB and line ends inside a caption become spaces."""
    lines = ["\t".join(COLUMNS)]
    lines.extend("\t".join(_cell(getattr(row, name)) for name in COLUMNS) for row in rows)
    return "\n".join(lines) + "\n"


def write_egoclip(path: Path, rows: Iterable[EgoClipRow]) -> bool:
    """Writes an EgoClip file, whole or not at all; returns False when the file already holds just that."""
    return write_text_atomically(path, format_egoclip(rows))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.7f}".rstrip("0").rstrip(".")
    if isinstance(value, tuple):
        return str(list(value))
    text = " ".join(str(value).split())
    # A cell with quotes is written as a quoted cell, as every CSV reader expects.
    return '"' + text.replace('"', '""') + '"' if '"' in text else text


def _cells(path: Path) -> Iterator[tuple[int, list[str] | None, dict[str, int]]]:
    """Yields (line number, cells or None where a line is no text, column name -> place)."""
    if not path.is_file():
        raise DataError(f"no EgoClip file at {path}; expected a TAB separated text file with a header line")
    with path.open("rb") as lines:
        header = lines.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
        columns = _columns(path, header)
        num_columns = header.count("\t") + 1
        for line_number, raw in enumerate(lines, start=2):
            if not raw.strip():
                continue
            try:
                yield line_number, _split(raw.decode("utf-8").rstrip("\r\n"), num_columns), columns
            except UnicodeDecodeError:
                yield line_number, None, columns


def _columns(path: Path, header: str) -> dict[str, int]:
    names = [name.strip().strip('"') for name in header.split("\t")]
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        hint = ""
        if len(names) == 1 and header.count(",") >= len(COLUMNS) - 1:
            hint = "; the header has commas but no TAB: write the file with TAB between the columns"
        raise DataError(
            f"{path}: the header lacks {', '.join(missing)}. Found {len(names)} TAB separated column(s): "
            f"{header[:200]!r}. Expected: {', '.join(COLUMNS)}{hint}"
        )
    return {name: names.index(name) for name in COLUMNS}


def _split(line: str, num_columns: int) -> list[str]:
    """Splits one line; quotes count only when that gives the right number of cells."""
    if '"' in line:
        try:
            cells = next(csv.reader([line], delimiter="\t"))
        except csv.Error:
            cells = []
        if len(cells) == num_columns:
            return cells
    return line.split("\t")


def _record(cells: list[str], columns: dict[str, int], line_number: int, report: _Report) -> ClipRecord:
    if len(cells) <= max(columns.values()):
        raise _RowError(Reason.BAD_ROW, f"{len(cells)} cells, expected {max(columns.values()) + 1}")
    row = {name: cells[place].strip() for name, place in columns.items()}
    duration_s, narration_s, start_s, end_s = (
        _seconds(row, name) for name in ("video_dur", "narration_time", "clip_start", "clip_end")
    )
    if not row["video_uid"]:
        raise _RowError(Reason.BAD_ROW, "video_uid is empty")
    if not row["clip_text"]:
        raise _RowError(Reason.EMPTY_CAPTION, "clip_text is empty")
    try:
        verbs, nouns = parse_tags(row["tag_verb"]), parse_tags(row["tag_noun"])
    except ValueError as error:
        raise _RowError(Reason.BAD_ROW, str(error)) from error
    if end_s <= start_s or end_s <= 0:
        raise _RowError(Reason.END_BEFORE_START, f"clip {start_s} to {end_s} s holds nothing")
    if start_s >= duration_s:
        raise _RowError(Reason.OUTSIDE_VIDEO, f"clip starts at {start_s} s, the video has {duration_s} s")
    if start_s < 0:
        report.count(Reason.NEGATIVE_START_CLAMPED, line_number, f"clip_start {start_s} set to 0")
        start_s = 0.0
    if end_s > duration_s:
        report.count(END_CLAMPED, line_number, f"clip_end {end_s} set to video_dur {duration_s}")
        end_s = duration_s
    return make_record(row["video_uid"], start_s, end_s, narration_s, row["clip_text"], verbs, nouns)


def _seconds(row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _RowError(Reason.BAD_ROW, f"{name} is {row[name][:40]!r}, expected seconds")
    return value
