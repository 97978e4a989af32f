import zlib

import pytest

from pipeline.clip import make_clip_id
from pipeline.egoclip import COLUMNS, EgoClipRow, parse_tags, read_egoclip, write_egoclip
from pipeline.errors import DataError

HEADER = "\t".join(COLUMNS)
GOOD = (
    "0\tuid-1\t10.0\tnarration_pass_1\t0\t3.3445\t2.967651\t3.721266\t"
    "#C C opens the box\t[93]\t[192, 115, 12]"
)


def row(**changes):
    cells = dict(zip(COLUMNS, GOOD.split("\t"), strict=True)) | changes
    return "\t".join(cells[name] for name in COLUMNS)


def read(tmp_path, *lines, header=HEADER):
    path = tmp_path / "egoclip.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return read_egoclip(path)


def test_a_good_row_becomes_a_record_field_by_field(tmp_path):
    (record,), report = read(tmp_path, GOOD)
    assert (record.video_uid, record.caption) == ("uid-1", "#C C opens the box")
    assert (record.start_s, record.end_s, record.narration_s) == (2.967651, 3.721266, 3.3445)
    assert (record.verbs, record.nouns) == ((93,), (192, 115, 12))
    assert (report.rows, report.kept, report.counts) == (1, 1, {})


def test_a_clip_id_is_made_of_video_milliseconds_and_caption_and_has_no_dot():
    checksum = zlib.crc32(b"#C C opens the box")
    expected = f"uid_1_x_000002968_000003721_{checksum:08x}"
    assert make_clip_id("uid.1/x", 2.967651, 3.721266, "#C C opens the box") == expected


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_named(tmp_path, name):
    header = HEADER.replace(name, "other")
    with pytest.raises(DataError, match=f"header lacks {name}"):
        read(tmp_path, GOOD, header=header)


def test_commas_instead_of_tabs_get_a_hint(tmp_path):
    with pytest.raises(DataError, match="has commas but no TAB"):
        read(tmp_path, GOOD, header=",".join(COLUMNS))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no EgoClip file at"):
        read_egoclip(tmp_path / "absent.csv")


def test_columns_are_found_by_name_and_extra_ones_are_ignored(tmp_path):
    (record,), _ = read(tmp_path, "x\t" + GOOD, header="extra\t" + HEADER)
    assert record.video_uid == "uid-1"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clip_start": "soon"}, "bad_row"),
        ({"clip_end": "nan"}, "bad_row"),
        ({"clip_end": "1e300"}, "bad_row"),
        ({"narration_time": "-1e10"}, "bad_row"),
        ({"video_uid": ""}, "bad_row"),
        ({"tag_verb": "[__import__('os')]"}, "bad_row"),
        ({"tag_noun": "93"}, "bad_row"),
        ({"clip_text": "  "}, "empty_caption"),
        ({"clip_end": "2.5"}, "end_before_start"),
        ({"clip_start": "-3", "clip_end": "-1"}, "end_before_start"),
        ({"clip_start": "10.0", "clip_end": "11.0"}, "outside_video"),
    ],
)
def test_an_unusable_row_is_skipped_and_counted_with_its_line(tmp_path, changes, reason):
    records, report = read(tmp_path, GOOD, row(**changes))
    assert len(records) == 1
    assert (report.rows, report.kept, report.counts) == (2, 1, {reason: 1})
    assert report.examples[reason][0].startswith("line 3: ")


def test_a_row_with_too_few_cells_is_counted(tmp_path):
    records, report = read(tmp_path, "1\tuid", GOOD)
    assert (len(records), report.counts) == (1, {"bad_row": 1})
    assert report.examples["bad_row"] == ["line 2: 2 cells, expected 11"]


def test_a_negative_start_is_set_to_zero_and_counted(tmp_path):
    (record,), report = read(tmp_path, row(clip_start="-0.25"))
    assert record.start_s == 0.0
    assert (report.kept, report.counts) == (1, {"negative_start_clamped": 1})


def test_an_end_beyond_the_video_is_set_to_its_end_and_counted(tmp_path):
    (record,), report = read(tmp_path, row(clip_end="12.5"))
    assert record.end_s == 10.0
    assert (report.kept, report.counts) == (1, {"end_beyond_video_clamped": 1})


def test_the_same_clip_twice_is_kept_once(tmp_path):
    records, report = read(tmp_path, GOOD, row(clip_idx="1", narration_source="narration_pass_2"))
    assert (len(records), report.counts) == (1, {"duplicate": 1})


def test_a_stray_quote_costs_no_other_row(tmp_path):
    quoted = row(clip_text='"#C C says hello', clip_idx="1")
    records, report = read(tmp_path, quoted, GOOD)
    assert [record.caption for record in records] == ['"#C C says hello', "#C C opens the box"]
    assert report.counts == {}


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path):
    path = tmp_path / "egoclip.csv"
    path.write_bytes(HEADER.encode() + b"\r\n\xff\xfe\r\n" + GOOD.encode() + b"\r\n")
    records, report = read_egoclip(path)
    assert (len(records), report.counts) == (1, {"bad_row": 1})


def test_only_the_first_examples_are_kept(tmp_path):
    _, report = read(tmp_path, *["short"] * 9)
    assert report.counts == {"bad_row": 9}
    assert [line.split(":")[0] for line in report.examples["bad_row"]] == [f"line {n}" for n in range(2, 7)]
    assert report.lines()[0] == "9 rows, 0 kept"


@pytest.mark.parametrize(("text", "tags"), [("", ()), ("[]", ()), ("[ 1, 2 ]", (1, 2)), ("[7]", (7,))])
def test_tag_lists_are_parsed(text, tags):
    assert parse_tags(text) == tags


@pytest.mark.parametrize("text", ["[1 2]", "[-1]", "[1.5]", "1, 2", "[a]", "nan", "[[1]]"])
def test_anything_else_is_no_tag_list(text):
    with pytest.raises(ValueError, match="not a list of class numbers"):
        parse_tags(text)


def test_rows_survive_writing_and_reading(tmp_path):
    path = tmp_path / "a" / "egoclip.csv"
    text = '#C C says "hi"\tand leaves'
    rows = [EgoClipRow(0, "uid", 30.0, "narration_pass_1", 4, 1.25, 0.5, 2.0000001, text, (1,), ())]
    assert write_egoclip(path, rows)
    (record,), report = read_egoclip(path)
    assert (record.start_s, record.end_s, record.narration_s) == (0.5, 2.0000001, 1.25)
    assert record.caption == '#C C says "hi" and leaves'
    assert (record.verbs, record.nouns, report.counts) == ((1,), (), {})
    assert not write_egoclip(path, rows)
