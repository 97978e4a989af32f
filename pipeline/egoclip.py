"""Reads and writes EgoClip annotation files (TAB separated, 11 columns, arXiv 2206.01670).

The reader goes line by line, keeps every row it can use, and counts every row it cannot, with its line
number: nothing is dropped without a word. Tag lists are parsed as integers and never evaluated.
"""

import csv
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.atomic import write_text_atomically
from pipeline.clip import MAX_TIME_S
from pipeline.clip_table import ClipTable, ClipTableBuilder
from pipeline.errors import DataError, Reason
from pipeline.read_report import ReadReport, RowCounter, RowError, read_rows
from pipeline.storage import StoragePath

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
_TAGS = re.compile(r"\[\s*(?:\d+(?:\s*,\s*\d+)*\s*,?\s*)?\]")
# Class numbers are stored in 32 bits.
_MAX_TAG = 2**31 - 1


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


def parse_tags(text: str) -> tuple[int, ...]:
    """Parses a tag list such as "[192, 115]"; empty text and "[]" give (). Raises ValueError otherwise."""
    text = text.strip()
    if not text:
        return ()
    if not _TAGS.fullmatch(text):
        raise ValueError(f"{text[:60]!r} is not a list of class numbers such as [192, 115]")
    tags = tuple(int(number) for number in re.findall(r"\d+", text))
    if tags and max(tags) > _MAX_TAG:
        raise ValueError(f"{text[:60]!r} holds a class number above {_MAX_TAG}")
    return tags


def read_egoclip(path: StoragePath) -> tuple[ClipTable, ReadReport]:
    """Reads an EgoClip file into a table and a report of everything that was not as it should be.

    Negative starts are set to 0, ends beyond the video to its end; rows that cannot be used are skipped;
    all are counted with line numbers. Raises DataError when there is no file or a column is missing.
    """
    return read_rows(_rows(path), _add_row)


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


def _rows(path: StoragePath) -> Iterator[tuple[int, dict[str, str] | RowError]]:
    """Yields (line number, column -> cell, or what is wrong with the line)."""
    if not path.is_file():
        raise DataError(f"no EgoClip file at {path}; expected a TAB separated text file with a header line")
    with path.open("rb") as lines:
        header = lines.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
        columns = _columns(path, header)
        num_columns = header.count("\t") + 1
        for line_number, raw in enumerate(lines, start=2):
            if raw.strip():
                yield line_number, _row(raw, columns, num_columns)


def _row(raw: bytes, columns: dict[str, int], num_columns: int) -> dict[str, str] | RowError:
    try:
        cells = _split(raw.decode("utf-8").rstrip("\r\n"), num_columns)
    except UnicodeDecodeError:
        return RowError(Reason.BAD_ROW, "not UTF-8 text")
    if len(cells) <= max(columns.values()):
        return RowError(Reason.BAD_ROW, f"{len(cells)} cells, expected {max(columns.values()) + 1}")
    return {name: cells[place].strip() for name, place in columns.items()}


def _columns(path: StoragePath, header: str) -> dict[str, int]:
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


def _add_row(builder: ClipTableBuilder, row: dict[str, str], line_number: int, counter: RowCounter) -> None:
    duration_s, narration_s, start_s, end_s = (
        _seconds(row, name) for name in ("video_dur", "narration_time", "clip_start", "clip_end")
    )
    if not row["video_uid"]:
        raise RowError(Reason.BAD_ROW, "video_uid is empty")
    if not row["clip_text"]:
        raise RowError(Reason.EMPTY_CAPTION, "clip_text is empty")
    try:
        verbs, nouns = parse_tags(row["tag_verb"]), parse_tags(row["tag_noun"])
    except ValueError as error:
        raise RowError(Reason.BAD_ROW, str(error)) from error
    if end_s <= start_s or end_s <= 0:
        raise RowError(Reason.END_BEFORE_START, f"clip {start_s} to {end_s} s holds nothing")
    if start_s >= duration_s:
        raise RowError(Reason.OUTSIDE_VIDEO, f"clip starts at {start_s} s, the video has {duration_s} s")
    if start_s < 0:
        counter.count(Reason.NEGATIVE_START_CLAMPED, line_number, f"clip_start {start_s} set to 0")
        start_s = 0.0
    if end_s > duration_s:
        counter.count(END_CLAMPED, line_number, f"clip_end {end_s} set to video_dur {duration_s}")
        end_s = duration_s
    builder.add(row["video_uid"], start_s, end_s, narration_s, row["clip_text"], verbs, nouns)


def _seconds(row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_TIME_S:
        raise RowError(Reason.BAD_ROW, f"{name} is {row[name][:40]!r}, expected seconds")
    return value
