"""The official files of EPIC-KITCHENS-100's multi-instance retrieval, and what follows from their classes."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from pipeline.epic_retrieval import RetrievalSet, read_epic_retrieval
from pipeline.errors import DataError

HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,"
    "stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
NAMES = HEADER.split(",")
PLATE = (
    "P01_11_0,P01,P01_11,00:00:00.560,00:00:00.00,00:00:01.89,1,113,take plate,take,0,plate,2,['plate'],[2]"
)
KNIFE = (
    "P01_11_7,P01,P01_11,nan,00:00:02.50,00:00:04.25,27,111,cut onion and bread,cut,7,onion,4,"
    "\"['onion', 'bread']\",\"[4, 1]\""
)
AGAIN = (
    "P02_03_1,P02,P02_03,00:00:09.100,00:00:09.00,00:00:10.00,1,60,take plate,take,0,plate,2,['plate'],[2]"
)
SENTENCES = ("P01_11_0,take plate", "P01_11_7,cut onion and bread")


def changed(**changes: str) -> str:
    cells = dict(zip(NAMES, next(csv.reader([PLATE])), strict=True)) | changes
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells[name] for name in NAMES)
    return out.getvalue()


def read(folder: Path, clips=(PLATE, KNIFE, AGAIN), sentences=SENTENCES) -> RetrievalSet:
    clips_path, captions_path = folder / "test.csv", folder / "test_sentence.csv"
    clips_path.write_text("\n".join([HEADER, *clips]) + "\n")
    captions_path.write_text("\n".join(["narration_id,narration", *sentences]) + "\n")
    return read_epic_retrieval(clips_path, captions_path)


def test_clips_and_captions_keep_the_order_of_their_files(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert [(clip.video_uid, clip.start_s, clip.end_s, clip.caption) for clip in found.clips] == [
        ("P01_11", 0.0, 1.89, "take plate"),
        ("P01_11", 2.5, 4.25, "cut onion and bread"),
        ("P02_03", 9.0, 10.0, "take plate"),
    ]
    assert found.captions == ("take plate", "cut onion and bread")
    assert found.caption_clips == (0, 1)


def test_classes_are_multi_hot_by_clip(tmp_path: Path) -> None:
    verbs, nouns = read(tmp_path).clip_classes()
    assert [np.flatnonzero(row).tolist() for row in verbs] == [[0], [7], [0]]
    assert [np.flatnonzero(row).tolist() for row in nouns] == [[2], [1, 4], [2]]


@pytest.mark.parametrize(
    "changes",
    [
        {"verb_class": ""},
        {"verb_class": "take"},
        {"verb_class": "-1"},
        {"all_noun_classes": "[]"},
        {"all_noun_classes": "[__import__('os')]"},
        {"start_timestamp": "0.5"},
        {"stop_timestamp": "00:00:00.00"},
        {"narration": ""},
    ],
)
def test_one_bad_row_stops_the_reading_with_its_line(tmp_path: Path, changes: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"test\.csv, line 3: "):
        read(tmp_path, clips=(AGAIN, changed(**changes)))


@pytest.mark.parametrize(
    ("clips", "sentences", "words"),
    [
        ((PLATE, PLATE), SENTENCES, "line 3: narration_id P01_11_0 comes again"),
        ((PLATE, KNIFE), (*SENTENCES, SENTENCES[0]), "line 4: narration_id P01_11_0 comes again"),
        ((PLATE,), SENTENCES, "line 3: P01_11_7 is no clip of .*different splits"),
        ((PLATE,), ("P01_11_0,take cup",), "is 'take cup', in .* it is 'take plate'"),
        ((PLATE,), (), "a header and no captions"),
        ((PLATE,), ("P01_11_0,take, plate",), "line 2: 3 cells, expected 2"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, clips, sentences, words) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path, clips, sentences)


def test_a_missing_column_or_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text("narration_id,narration\n")
    with pytest.raises(DataError, match=r"lacks video_id, .*Expected the CSV files of retrieval_annotations"):
        read_epic_retrieval(path, path)
    with pytest.raises(DataError, match="no EPIC-KITCHENS file at"):
        read_epic_retrieval(tmp_path / "absent.csv", path)
