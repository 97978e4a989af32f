"""Reads EPIC-KITCHENS-100 annotations: EPIC_100_train.csv and EPIC_100_validation.csv (comma separated).

Times come from the timestamps; the frame columns are left out, since they hold at one frame rate only. Class numbers
are those of EPIC's own taxonomy. Lists are parsed as integers and never evaluated.
"""

import csv
import re
from collections.abc import Iterator, Sequence

from pipeline.clip_table import ClipTable, ClipTableBuilder
from pipeline.egoclip import parse_tags
from pipeline.errors import DataError, Reason
from pipeline.read_report import ReadReport, RowCounter, RowError, read_rows
from pipeline.storage import StoragePath

NARRATION_TIME = "narration_timestamp"
# What is read; files have more columns. NARRATION_TIME may be absent.
COLUMNS = ("video_id", "start_timestamp", "stop_timestamp", "narration", "verb_class", "all_noun_classes")
_EXPECTED = "EPIC_100_train.csv or EPIC_100_validation.csv; the test files have no narrations and no classes"
NARRATION_SET_TO_MIDDLE = "narration_time_set_to_middle"
NO_NOUNS = "no_noun_class"
_TIMESTAMP = re.compile(r"([0-9]{2}):([0-5][0-9]):([0-5][0-9](?:\.[0-9]{1,9})?)")
_CLASS = re.compile(r"[0-9]{1,9}")


def parse_timestamp(text: str) -> float:
    """Turns "HH:MM:SS.ss" into seconds; the fraction may be absent. Raises ValueError for anything else."""
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r}, expected HH:MM:SS.ss such as 00:01:02.50")
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])


def read_epic_kitchens(path: StoragePath) -> tuple[ClipTable, ReadReport]:
    """Reads one file into a table and a report of everything that was not as it should be.

    A clip has one verb and all nouns of its narration. Without a readable narration time it gets the middle of the
    clip: counted. Rows that cannot be used are skipped and counted; all with line numbers. Raises DataError when there
    is no file or a column is missing.
    """
    return read_rows(read_csv(path, COLUMNS, _EXPECTED), _add_row)


def read_csv(
    path: StoragePath, columns: Sequence[str], expected: str
) -> Iterator[tuple[int, dict[str, str] | RowError]]:
    """Yields (line number, column -> cell, or what is wrong with the line) of a file that has at least `columns`.

    Raises DataError, which says what file was `expected`, when there is none or a column is missing.
    """
    if not path.is_file():
        raise DataError(f"no EPIC-KITCHENS file at {path}; expected {expected}")
    with path.open("rb") as lines:
        header = lines.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
        names = _names(path, header, columns, expected)
        for line_number, raw in enumerate(lines, start=2):
            if raw.strip():
                yield line_number, _row(raw, names)


def _names(path: StoragePath, header: str, columns: Sequence[str], expected: str) -> list[str]:
    names = [name.strip().strip('"') for name in header.split(",")]
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(
            f"{path}: the header lacks {', '.join(missing)}. Found {len(names)} comma separated column(s): "
            f"{header[:200]!r}. Expected {expected}"
        )
    return names


def _row(raw: bytes, names: list[str]) -> dict[str, str] | RowError:
    # Line by line, so that a stray quote costs its own row and no other.
    try:
        cells = next(csv.reader([raw.decode("utf-8").rstrip("\r\n")], strict=True))
    except UnicodeDecodeError:
        return RowError(Reason.BAD_ROW, "not UTF-8 text")
    except csv.Error as error:
        return RowError(Reason.BAD_ROW, f"not a CSV row: {error}")
    # One cell too many is a comma without quotes, which shifts all cells after it.
    if len(cells) != len(names):
        return RowError(Reason.BAD_ROW, f"{len(cells)} cells, expected {len(names)}")
    return {name: cell.strip() for name, cell in zip(names, cells, strict=True)}


def _add_row(builder: ClipTableBuilder, row: dict[str, str], line_number: int, counter: RowCounter) -> None:
    start_s, end_s = _seconds(row, "start_timestamp"), _seconds(row, "stop_timestamp")
    if not row["video_id"]:
        raise RowError(Reason.BAD_ROW, "video_id is empty")
    if not row["narration"]:
        raise RowError(Reason.EMPTY_CAPTION, "narration is empty")
    if not _CLASS.fullmatch(row["verb_class"]):
        raise RowError(Reason.BAD_ROW, f"verb_class is {row['verb_class'][:40]!r}, expected a class number")
    try:
        nouns = parse_tags(row["all_noun_classes"])
    except ValueError as error:
        raise RowError(Reason.BAD_ROW, f"all_noun_classes: {error}") from error
    if end_s <= start_s:
        raise RowError(Reason.END_BEFORE_START, f"clip {start_s} to {end_s} s holds nothing")
    if not nouns:
        counter.count(NO_NOUNS, line_number, f"all_noun_classes is {row['all_noun_classes']!r}")
    try:
        narration_s = _seconds(row, NARRATION_TIME)
    except RowError as error:
        narration_s = (start_s + end_s) / 2
        counter.count(NARRATION_SET_TO_MIDDLE, line_number, f"{error.detail}; set to {narration_s} s")
    verbs = (int(row["verb_class"]),)
    builder.add(row["video_id"], start_s, end_s, narration_s, row["narration"], verbs, nouns)


def _seconds(row: dict[str, str], name: str) -> float:
    try:
        return parse_timestamp(row.get(name, ""))
    except ValueError as error:
        raise RowError(Reason.BAD_ROW, f"{name} is {error}") from error
