import csv
import io

import pytest

from pipeline.epic_kitchens import COLUMNS, parse_timestamp, read_epic_kitchens
from pipeline.errors import DataError

HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,"
    "stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
NAMES = HEADER.split(",")
GOOD = "P01_01_0,P01,P01_01,00:00:01.089,00:00:00.14,00:00:03.37,8,202,open door,open,3,door,3,['door'],[3]"
TWO_NOUNS = (
    "P01_102_0,P01,P01_102,01:02:03.100,01:02:00.50,01:02:04.25,27,111,take knife and plate,take,0,knife,4,"
    "\"['knife', 'plate']\",\"[4, 2]\""
)


def row(**changes):
    cells = dict(zip(NAMES, next(csv.reader([GOOD])), strict=True)) | changes
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells[name] for name in NAMES)
    return out.getvalue()


def read(tmp_path, *lines, header=HEADER):
    path = tmp_path / "EPIC_100_train.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return read_epic_kitchens(path)


def test_a_good_row_becomes_a_record_field_by_field(tmp_path):
    (record,), report = read(tmp_path, GOOD)
    assert (record.video_uid, record.caption) == ("P01_01", "open door")
    assert (record.start_s, record.end_s, record.narration_s) == (0.14, 3.37, 1.089)
    assert (record.verbs, record.nouns) == ((3,), (3,))
    assert record.clip_id.startswith("P01_01_000000140_000003370_")
    assert (report.rows, report.kept, report.counts) == (1, 1, {})


def test_hours_and_minutes_count_and_all_nouns_are_kept_in_order(tmp_path):
    (record,), report = read(tmp_path, TWO_NOUNS)
    # 1 h 2 min = 3720 s
    assert (record.start_s, record.end_s) == (3720.5, 3724.25)
    assert record.narration_s == pytest.approx(3723.1)
    assert (record.verbs, record.nouns, report.counts) == ((0,), (4, 2), {})


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_named(tmp_path, name):
    header = ",".join("other" if column == name else column for column in NAMES)
    with pytest.raises(DataError, match=f"header lacks {name}"):
        read(tmp_path, GOOD, header=header)


def test_the_test_split_is_refused_with_a_hint(tmp_path):
    header = "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp"
    with pytest.raises(DataError, match="the test files have no narrations and no classes"):
        read(tmp_path, header=header)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no EPIC-KITCHENS file at"):
        read_epic_kitchens(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"start_timestamp": "0.14"}, "bad_row"),
        ({"start_timestamp": ""}, "bad_row"),
        ({"stop_timestamp": "00:61:00.00"}, "bad_row"),
        ({"video_id": " "}, "bad_row"),
        ({"verb_class": "-1"}, "bad_row"),
        ({"verb_class": "open"}, "bad_row"),
        ({"verb_class": ""}, "bad_row"),
        ({"verb_class": "3000000000"}, "bad_row"),
        ({"all_noun_classes": "[__import__('os')]"}, "bad_row"),
        ({"all_noun_classes": "3"}, "bad_row"),
        ({"narration": "  "}, "empty_caption"),
        ({"stop_timestamp": "00:00:00.14"}, "end_before_start"),
    ],
)
def test_an_unusable_row_is_skipped_and_counted_with_its_line(tmp_path, changes, reason):
    records, report = read(tmp_path, GOOD, row(**changes))
    assert len(records) == 1
    assert (report.rows, report.kept, report.counts) == (2, 1, {reason: 1})
    assert report.examples[reason][0].startswith("line 3: ")


def test_a_comma_without_quotes_is_a_bad_row_not_a_shifted_one(tmp_path):
    records, report = read(tmp_path, GOOD.replace("open door", "open, door"))
    assert (len(records), report.examples) == (0, {"bad_row": ["line 2: 16 cells, expected 15"]})


def test_a_stray_quote_costs_no_other_row(tmp_path):
    records, report = read(tmp_path, GOOD.replace("open door", '"open door'), TWO_NOUNS)
    assert [record.video_uid for record in records] == ["P01_102"]
    assert report.counts == {"bad_row": 1}
    assert report.examples["bad_row"][0].startswith("line 2: not a CSV row")


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path):
    path = tmp_path / "EPIC_100_train.csv"
    path.write_bytes(b"\xef\xbb\xbf" + HEADER.encode() + b"\r\n\xff\xfe\r\n\r\n" + GOOD.encode() + b"\r\n")
    records, report = read_epic_kitchens(path)
    assert (len(records), report.rows) == (1, 2)
    assert report.examples == {"bad_row": ["line 2: not UTF-8 text"]}


@pytest.mark.parametrize("text", ["", "nan", "1.089"])
def test_without_a_readable_narration_time_the_middle_is_taken_and_counted(tmp_path, text):
    (record,), report = read(tmp_path, row(narration_timestamp=text, stop_timestamp="00:00:03.14"))
    # (0.14 + 3.14) / 2
    assert record.narration_s == pytest.approx(1.64)
    assert (report.kept, report.counts) == (1, {"narration_time_set_to_middle": 1})


def test_without_the_column_every_narration_time_is_the_middle(tmp_path):
    records, report = read(tmp_path, GOOD, TWO_NOUNS, header=HEADER.replace("narration_timestamp", "other"))
    assert [record.narration_s for record in records] == [pytest.approx(1.755), pytest.approx(3722.375)]
    assert (report.kept, report.counts) == (2, {"narration_time_set_to_middle": 2})


def test_a_row_without_nouns_is_kept_and_counted(tmp_path):
    (record,), report = read(tmp_path, row(all_noun_classes="[]"))
    assert (record.nouns, report.kept, report.counts) == ((), 1, {"no_noun_class": 1})


def test_the_same_clip_twice_is_kept_once(tmp_path):
    records, report = read(tmp_path, GOOD, row(narration_id="P01_01_9"))
    assert (len(records), report.counts) == (1, {"duplicate": 1})
    assert report.examples["duplicate"][0].startswith("line 3: clip P01_01_")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:00:00.14", 0.14), ("00:00:07", 7.0), ("01:01:01.001", 3661.001), ("99:59:59.5", 359999.5)],
)
def test_timestamps_are_seconds(text, seconds):
    assert parse_timestamp(text) == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize(
    "text",
    [
        "0:00:01.0",
        "00:00:60.0",
        "00:60:00.0",
        "-0:00:01.0",
        "00:00:01.",
        "00:00:01,5",
        "00:01",
        " 00:00:01",
        "",
    ],
)
def test_anything_else_is_no_timestamp(text):
    with pytest.raises(ValueError, match="expected HH:MM:SS"):
        parse_timestamp(text)
