import collections
import io
import os
import pickle
import pickletools

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.lavila import read_lavila

GOOD = ("uid-1", 2.0, 5.5, "#C C opens the box")


def read(tmp_path, entries, protocol=4):
    path = tmp_path / "ego4d_train.pkl"
    path.write_bytes(pickle.dumps(entries, protocol))
    return read_lavila(path)


class MakesFolder:
    """Unpickled by pickle.load it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_good_entry_becomes_a_record_field_by_field(tmp_path, protocol):
    (record,), report = read(tmp_path, [GOOD], protocol)
    assert (record.video_uid, record.caption) == ("uid-1", "#C C opens the box")
    # no narration time in the file: the middle
    assert (record.start_s, record.end_s, record.narration_s) == (2.0, 5.5, 3.75)
    assert record.clip_id.startswith("uid-1_000002000_000005500_")
    assert (report.rows, report.kept, report.counts) == (1, 1, {})


def test_no_clip_has_tags(tmp_path):
    table, _ = read(tmp_path, [GOOD, ("uid-2", 0, 1, ["a", "b"], [0.5, 0.25])])
    assert [(record.verbs, record.nouns) for record in table] == [((), ()), ((), ())]
    assert table.largest_tag("verbs") == table.largest_tag("nouns") == (-1, -1)


def test_what_the_narrator_wrote_has_a_fifth_value(tmp_path):
    (record,), report = read(tmp_path, [(*GOOD, 0.75)])
    assert (record.caption, report.counts) == ("#C C opens the box", {})


def test_of_several_texts_the_first_that_is_not_empty_is_kept_and_the_rest_counted(tmp_path):
    entries = [
        ("uid-1", 0, 1, [" ", "opens a box", "lifts a lid"], [0.1, 0.2, 0.3]),
        ("uid-1", 1, 2, ["waits"]),
    ]
    records, report = read(tmp_path, entries)
    assert [record.caption for record in records] == ["opens a box", "waits"]
    assert (report.kept, report.counts) == (2, {"further_captions_left_out": 1})
    assert report.examples["further_captions_left_out"] == ["entry 0: 1 of 3 texts kept"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (("uid-1", 2.0, 5.5), "bad_row"),
        ((*GOOD, 0.5, 0.5), "bad_row"),
        (list(GOOD), "bad_row"),
        (None, "bad_row"),
        ((7, 2.0, 5.5, "a"), "bad_row"),
        (("", 2.0, 5.5, "a"), "bad_row"),
        (("uid-1", "2.0", 5.5, "a"), "bad_row"),
        (("uid-1", True, 5.5, "a"), "bad_row"),
        (("uid-1", None, 5.5, "a"), "bad_row"),
        (("uid-1", 2.0, float("nan"), "a"), "bad_row"),
        (("uid-1", 2.0, 10**5000, "a"), "bad_row"),
        (("uid-1", 2.0, 5.5, {"text": "a"}), "bad_row"),
        (("uid-1", 2.0, 5.5, ["a", 3]), "bad_row"),
        (("uid-1", 2.0, 5.5, "half a letter \ud800"), "bad_row"),
        (("uid-1", 2.0, 5.5, " "), "empty_caption"),
        (("uid-1", 2.0, 5.5, []), "empty_caption"),
        (("uid-1", 2.0, 2.0, "a"), "end_before_start"),
        (("uid-1", -2.0, -1.0, "a"), "end_before_start"),
    ],
)
def test_an_unusable_entry_is_skipped_and_counted_with_its_place(tmp_path, entry, reason):
    records, report = read(tmp_path, [GOOD, entry])
    assert len(records) == 1
    assert (report.rows, report.kept, report.counts) == (2, 1, {reason: 1})
    assert report.examples[reason][0].startswith("entry 1: ")


def test_a_negative_start_is_set_to_zero_and_counted(tmp_path):
    (record,), report = read(tmp_path, [("uid-1", -0.5, 3.0, "a")])
    assert (record.start_s, record.narration_s) == (0.0, 1.5)
    assert (report.kept, report.counts) == (1, {"negative_start_clamped": 1})


def test_the_same_clip_twice_is_kept_once(tmp_path):
    records, report = read(tmp_path, [GOOD, None, GOOD])
    assert (len(records), report.counts) == (1, {"bad_row": 1, "duplicate": 1})
    assert report.examples["duplicate"][0].startswith("entry 2: clip uid-1_")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, protocol):
    folder = tmp_path / "made"
    with pytest.raises(DataError, match=rf"ego4d_train.pkl: it names {os.mkdir.__module__}.mkdir"):
        read(tmp_path, [GOOD, MakesFolder(folder)], protocol)
    assert not folder.exists()
    # The same bytes do run when read without care.
    pickle.loads((tmp_path / "ego4d_train.pkl").read_bytes())
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (b"cbuiltins\neval\n(V1 + 1\ntR.", "builtins.eval"),
        (b"(V1 + 1\nibuiltins\neval\n.", "builtins.eval"),
        (b"(cbuiltins\neval\nV1 + 1\no.", "builtins.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x051 + 1\x85R.", "builtins.eval"),
        (b"cos.path\njoin\n.", "os.path.join"),
        (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
    ],
)
def test_every_way_to_name_a_function_is_refused(tmp_path, program, name):
    pickletools.dis(program, out=io.StringIO())  # a well-formed program
    path = tmp_path / "a.pkl"
    path.write_bytes(program)
    with pytest.raises(DataError, match=f"it names {name}"):
        read_lavila(path)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(1.5), "numpy"),
        (collections.OrderedDict(), "collections.OrderedDict"),
        (1 + 2j, "builtins.complex"),
    ],
)
def test_other_types_are_refused_by_name(tmp_path, value, name):
    with pytest.raises(DataError, match=f"it names {name}"):
        read(tmp_path, [("uid-1", value, 5.5, "a")])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>not found</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        pickle.dumps([GOOD])[:-9],
        b"Pid\n.",
    ],
)
def test_what_is_no_whole_pickle_is_refused_with_its_first_bytes(tmp_path, content):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"no whole pickle of plain values .* it begins with b"):
        read_lavila(path)


@pytest.mark.parametrize("value", [{"0": GOOD}, GOOD, "text", None])
def test_a_pickle_of_something_else_than_a_list_is_refused(tmp_path, value):
    with pytest.raises(DataError, match="expected a pickled list of"):
        read(tmp_path, value)


def test_a_small_file_that_would_be_endless_in_print_is_one_bad_row(tmp_path):
    nested = []
    for _ in range(60):
        nested = [nested, nested]
    records, report = read(tmp_path, [nested, ("uid-1", nested, 1.0, "a"), ("uid-1", 0.0, 1.0, nested)])
    assert (len(records), report.counts) == (0, {"bad_row": 3})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no LaViLa file at"):
        read_lavila(tmp_path / "absent.pkl")
