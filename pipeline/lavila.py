"""Reads LaViLa's narration files (arXiv 2212.04501): a pickled list of (video uid, start s, end s, text or list of
texts) and, in what its narrator wrote, the negative log-likelihood of each text.

A pickle is a program, so this one is read without names: no class, no function, nothing is imported or called. The
files have no verb and noun classes, which EgoNCE needs: every clip comes with empty tags.
"""

import math
import pickle
from collections.abc import Iterator
from typing import Any, NoReturn

from pipeline.clip import MAX_TIME_S
from pipeline.clip_table import ClipTable, ClipTableBuilder
from pipeline.errors import DataError, Reason
from pipeline.read_report import ReadReport, RowCounter, RowError, read_rows
from pipeline.storage import StoragePath

FURTHER_CAPTIONS = "further_captions_left_out"
_EXPECTED = "expected a pickled list of (video uid, start s, end s, text or list of texts)"


def read_lavila(path: StoragePath) -> tuple[ClipTable, ReadReport]:
    """Reads a pickle into a table and a report of everything that was not as it should be.

    Of several texts the first that is not empty becomes the caption; entries whose other texts are left out are
    counted. The narration time is the middle of the clip. Negative starts are set to 0; entries that cannot be used
    are skipped; all are counted with their place in the list, from 0. Raises DataError when there is no file, when it
    names a class or function, or is no pickled list.
    """
    return read_rows(_entries(path), _add_entry, place="entry")


def _entries(path: StoragePath) -> Iterator[tuple[int, Any]]:
    entries = _load(path)
    # Taken off one by one: four million entries need not be there twice.
    entries.reverse()
    number = 0
    while entries:
        yield number, entries.pop()
        number += 1


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, texts, None and built-in containers have opcodes of their own; all else goes through here."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise DataError(
            f"it names {module_name}.{global_name}, which is neither imported nor called here; {_EXPECTED} of plain "
            "Python values. If you trust the file, load it yourself and write it again as such"
        )


def _load(path: StoragePath) -> list[Any]:
    if not path.is_file():
        raise DataError(f"no LaViLa file at {path}; {_EXPECTED}, such as ego4d_train.pkl")
    try:
        with path.open("rb") as file:
            entries = _PlainUnpickler(file).load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"read {path}: {error.strerror}; {_EXPECTED}") from error
    except Exception as error:  # damaged pickles raise nearly anything, says the manual of pickle
        with path.open("rb") as file:
            head = file.read(16)
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(
            f"{path} is no whole pickle of plain values ({what}); it begins with {head!r}; {_EXPECTED}"
        ) from error
    if not isinstance(entries, list):
        raise DataError(f"{path} holds {_brief(entries)}, {_EXPECTED}")
    return entries


def _add_entry(builder: ClipTableBuilder, entry: Any, number: int, counter: RowCounter) -> None:
    if not isinstance(entry, tuple):
        raise RowError(Reason.BAD_ROW, f"{_brief(entry)}, expected a tuple")
    if len(entry) not in (4, 5):
        raise RowError(Reason.BAD_ROW, f"{len(entry)} values, expected 4 or 5")
    video_uid = _text(entry[0], "video uid")
    start_s, end_s = _seconds(entry[1], "start"), _seconds(entry[2], "end")
    if not video_uid:
        raise RowError(Reason.BAD_ROW, "video uid is empty")
    texts = entry[3] if isinstance(entry[3], list) else [entry[3]]
    captions = [caption for caption in (_text(text, "narration") for text in texts) if caption]
    if not captions:
        raise RowError(Reason.EMPTY_CAPTION, f"narration is empty ({len(texts)} text(s))")
    if end_s <= start_s or end_s <= 0:
        raise RowError(Reason.END_BEFORE_START, f"clip {start_s} to {end_s} s holds nothing")
    if start_s < 0:
        counter.count(Reason.NEGATIVE_START_CLAMPED, number, f"start {start_s} set to 0")
        start_s = 0.0
    if len(texts) > 1:
        counter.count(FURTHER_CAPTIONS, number, f"1 of {len(texts)} texts kept")
    builder.add(video_uid, start_s, end_s, (start_s + end_s) / 2, captions[0], (), ())


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(Reason.BAD_ROW, f"{name} is {_brief(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(Reason.BAD_ROW, f"{name} is {_brief(value)}, which is no Unicode text") from error
    return value.strip()


def _seconds(value: Any, name: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        seconds = float(value) if is_number else math.nan
    except OverflowError:
        seconds = math.inf
    if not abs(seconds) <= MAX_TIME_S:
        raise RowError(Reason.BAD_ROW, f"{name} is {_brief(value)}, expected seconds")
    return seconds


def _brief(value: Any) -> str:
    # Never repr() of a container: one that shares its parts can be small in the file and endless in print.
    if isinstance(value, str):
        return repr(value[:40])
    if value is None or isinstance(value, float):
        return repr(value)
    return f"of type {type(value).__name__}"
