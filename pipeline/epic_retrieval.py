"""Reads the multi-instance retrieval split of EPIC-KITCHENS-100: EPIC_100_retrieval_test.csv and
EPIC_100_retrieval_test_sentence.csv, or the pair of train.

Clips are the rows of the first file; captions are the distinct narrations of the second, each known by the clip that it
comes from and having its classes. Narration times are no part of it: clips get their middle. A benchmark is scored
whole or not at all, so one bad row stops the reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from pipeline.clip import ClipRecord, make_record
from pipeline.egoclip import parse_tags
from pipeline.epic_kitchens import COLUMNS, parse_timestamp, read_csv
from pipeline.errors import DataError
from pipeline.read_report import RowError
from pipeline.storage import StoragePath

CLIP_COLUMNS = ("narration_id", *COLUMNS)
CAPTION_COLUMNS = ("narration_id", "narration")


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """Clips in the order of their file, and captions in the order of theirs; `caption_clips[c]` is the place among the
    clips of the one that caption c comes from.
    """

    clips: tuple[ClipRecord, ...]
    captions: tuple[str, ...]
    caption_clips: tuple[int, ...]

    def clip_classes(self) -> tuple[Bool[np.ndarray, "V C"], Bool[np.ndarray, "V U"]]:
        """Multi-hot verbs and nouns of the clips; rows of `caption_clips` are those of the captions."""
        return (
            _multi_hot([clip.verbs for clip in self.clips]),
            _multi_hot([clip.nouns for clip in self.clips]),
        )


def read_epic_retrieval(clips_path: StoragePath, captions_path: StoragePath) -> RetrievalSet:
    """Reads the two files of one split.

    Raises DataError, naming file and line, for a missing file or column, a row that cannot be read, a narration id
    that comes twice, and a caption whose clip is not there or has another narration.
    """
    clips: list[ClipRecord] = []
    place: dict[str, int] = {}
    for line, row in _rows(clips_path, CLIP_COLUMNS):
        if row["narration_id"] in place:
            raise DataError(f"{clips_path}, line {line}: narration_id {row['narration_id']} comes again")
        place[row["narration_id"]] = len(clips)
        clips.append(_clip(clips_path, line, row))
    captions: dict[str, str] = {}
    for line, row in _rows(captions_path, CAPTION_COLUMNS):
        own, where = row["narration_id"], f"{captions_path}, line {line}"
        if own in captions:
            raise DataError(f"{where}: narration_id {own} comes again")
        if own not in place:
            raise DataError(f"{where}: {own} is no clip of {clips_path}; the files are of different splits")
        if row["narration"] != clips[place[own]].caption:
            raise DataError(
                f"{where}: the narration of {own} is {row['narration'][:60]!r}, in {clips_path} it is "
                f"{clips[place[own]].caption[:60]!r}; the files are of different versions"
            )
        captions[own] = row["narration"]
    if not captions:
        raise DataError(f"{captions_path} has a header and no captions")
    return RetrievalSet(tuple(clips), tuple(captions.values()), tuple(place[own] for own in captions))


def _rows(path: StoragePath, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    rows = []
    for line, row in read_csv(path, columns, "the CSV files of retrieval_annotations"):
        if isinstance(row, RowError):
            raise DataError(f"{path}, line {line}: {row.detail}")
        rows.append((line, row))
    return rows


def _clip(path: StoragePath, line: int, row: dict[str, str]) -> ClipRecord:
    try:
        start_s, end_s = parse_timestamp(row["start_timestamp"]), parse_timestamp(row["stop_timestamp"])
        verbs, nouns = parse_tags(f"[{row['verb_class']}]"), parse_tags(row["all_noun_classes"])
    except ValueError as error:
        raise DataError(f"{path}, line {line}: {error}") from error
    if not (row["video_id"] and row["narration"] and len(verbs) == 1 and nouns and end_s > start_s):
        raise DataError(
            f"{path}, line {line}: a clip needs a video_id, a narration, one verb, a noun, and an end after its "
            "start; take the file of the official release"
        )
    return make_record(row["video_id"], start_s, end_s, (start_s + end_s) / 2, row["narration"], verbs, nouns)


def _multi_hot(classes: Sequence[Sequence[int]]) -> np.ndarray:
    hot = np.zeros((len(classes), 1 + max(max(own) for own in classes)), dtype=np.bool_)
    for row, own in enumerate(classes):
        hot[row, list(own)] = True
    return hot
