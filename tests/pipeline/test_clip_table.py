import pickle

from pipeline.clip import make_record
from pipeline.clip_table import ClipTable, ClipTableBuilder

RECORDS = [
    make_record("b", 2.0, 3.0, 2.5, "#C C opens a box", (3,), (1, 2)),
    make_record("a.1", 4.0, 5.0, 4.5, "#C C waits", (), ()),
    make_record("b", 1.0, 3.0, 1.5, "#C C closes a box", (7,), (1,)),
]


def test_a_table_reads_like_the_records_it_was_made_of():
    table = ClipTable.of(RECORDS)
    assert list(table) == RECORDS
    assert [table[-1], *table[:2]] == [RECORDS[2], *RECORDS[:2]]
    assert table.video_uids == ["a.1", "b"]
    assert list(pickle.loads(pickle.dumps(table))) == RECORDS


def test_an_empty_table_has_no_clips_no_repeats_and_no_tags():
    table = ClipTableBuilder().build()
    assert (len(table), list(table), table.video_uids) == (0, [], [])
    assert table.repeats().tolist() == []
    assert list(table.in_order()) == []
    assert table.largest_tag("verbs") == (-1, -1)


def test_order_is_by_uid_then_time_then_id_as_of_the_records():
    same_time = [make_record("b", 1.0, 3.0, 1.5, f"#C C counts {n}", (), ()) for n in range(5)]
    table = ClipTable.of([*RECORDS, *same_time]).in_order()
    assert list(table) == sorted(
        [*RECORDS, *same_time], key=lambda clip: (clip.video_uid, clip.start_s, clip.end_s, clip.clip_id)
    )


def test_a_sorted_table_is_not_copied_to_be_sorted_again():
    table = ClipTable.of(RECORDS).in_order()
    assert table.in_order() is table


def test_repeats_are_rows_with_the_id_of_an_earlier_row():
    # The same to the millisecond, and "a/1" stands in ids as "a_1" does: as "a.1".
    again = make_record("b", 2.0004, 2.9996, 9.0, "#C C opens a box", (3,), (1, 2))
    alike = make_record("a/1", 4.0, 5.0, 4.5, "#C C waits", (), ())
    other = make_record("b", 2.0006, 3.0, 2.5, "#C C opens a box", (3,), (1, 2))
    table = ClipTable.of([*RECORDS, again, other, alike])
    ids = [clip.clip_id for clip in table]
    assert ids[3] == ids[0]
    assert ids[5] == ids[1]
    assert table.repeats().tolist() == [3, 5]
    assert list(table.without(table.repeats())) == [*RECORDS, other]


def test_the_largest_tag_is_found_with_a_clip_that_has_it():
    table = ClipTable.of(RECORDS)
    assert table.largest_tag("verbs") == (7, 2)
    assert table.largest_tag("nouns") == (2, 0)
    assert table[1:].largest_tag("verbs") == (7, 1)
