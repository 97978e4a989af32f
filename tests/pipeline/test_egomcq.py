import json
import random
from collections import Counter

import pytest

from pipeline.clip import make_record
from pipeline.egomcq import EgoMcqError, build_egomcq, probe_questions, read_egomcq

REVERSED = [(0, 1), (2, 3)]


def clip_json(uid, number, text="#C C opens the box"):
    return {
        "video_uid": uid,
        "clip_start": str(float(number)),
        "clip_end": number + 1.0,
        "clip_text": f"{text} {number}",
        "narration_time": number + 0.5,
        "tag_noun": "[3]",
        "tag_verb": "[2]",
    }


def question(kind=2, answer=1):
    uids = ["v"] * 5 if kind == 2 else list("abcde")
    choices = {str(index): clip_json(uid, index) for index, uid in enumerate(uids)}
    return {"answer": answer, "types": kind, "query": dict(choices[str(answer)]), "choices": choices}


def read(tmp_path, value):
    path = tmp_path / "egomcq.json"
    path.write_text(json.dumps(value))
    return read_egomcq(path)


def held_out(num_videos=6, num_clips=12):
    """Clips that walk through pairs of reversed actions on three objects."""
    actions = [(verb, noun) for noun in range(3) for verb in (0, 1, 2, 3)]
    return [
        make_record(
            f"video-{video}",
            place + 0.1,
            place + 0.9,
            place + 0.5,
            f"verb {verb} noun {noun}",
            (verb,),
            (noun,),
        )
        for video in range(num_videos)
        for place, (verb, noun) in enumerate((actions[video:] + actions[:video])[:num_clips])
    ]


def test_type_one_is_inter_and_type_two_is_intra(tmp_path):
    inter, intra = read(tmp_path, {"7": question(2), "3": question(1)})
    assert (inter.question_id, inter.kind) == (3, "inter")
    assert (intra.question_id, intra.kind) == (7, "intra")


def test_times_may_be_text_and_the_query_has_the_times_of_the_answer(tmp_path):
    (item,) = read(tmp_path, {"0": question(2, answer=4)})
    assert item.choices[4].start_s == 4.0
    assert (item.query.start_s, item.query.end_s) == (4.0, 5.0)
    assert (item.query.caption, item.query.verbs, item.query.nouns) == ("#C C opens the box 4", (2,), (3,))


def broken(**changes):
    return question() | changes


def without(entry, key):
    return {name: value for name, value in entry.items() if name != key}


FOUR = {str(index): clip_json("v", index) for index in range(4)}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (broken(types=3), "types is 3, expected 1"),
        (broken(types=True), "types is True"),
        (broken(answer=5), "answer is 5, expected 0..4"),
        (broken(answer="1"), "answer is '1'"),
        (broken(choices=FOUR), "expected exactly"),
        (without(question(), "query"), "'query' is missing"),
        (broken(query={"clip_text": "a"}), "query lacks tag_noun, tag_verb"),
        (broken(choices=FOUR | {"4": without(clip_json("v", 4), "clip_end")}), "choice 4 lacks clip_end"),
        (broken(choices=FOUR | {"4": clip_json("v", 4) | {"clip_end": "late"}}), "late"),
        (broken(choices=FOUR | {"4": clip_json("w", 4)}), "should come from 1 video"),
        (question(2) | {"types": 1}, "should come from 5 video"),
        (question(1) | {"types": 2}, "should come from 1 video"),
        ([], "expected an object"),
    ],
)
def test_an_untrustworthy_question_is_named(tmp_path, entry, message):
    with pytest.raises(EgoMcqError, match=f"question 12: .*{message}"):
        read(tmp_path, {"11": question(), "12": entry})


def test_a_missing_file_and_a_wrong_document_are_named(tmp_path):
    with pytest.raises(EgoMcqError, match="no EgoMCQ file"):
        read_egomcq(tmp_path / "absent.json")
    with pytest.raises(EgoMcqError, match="expected an object of questions"):
        read(tmp_path, [])
    with pytest.raises(EgoMcqError, match="'first' is not a number"):
        read(tmp_path, {"first": question()})


def test_built_questions_satisfy_the_strict_reader(tmp_path):
    records = held_out()
    questions = read(tmp_path, build_egomcq(records, random.Random(0)))
    by_id = {record.clip_id: record for record in records}
    assert Counter(item.kind for item in questions) == {"inter": 72, "intra": 72}
    for item in questions:
        assert len({choice.caption for choice in item.choices}) == 5
        assert item.choices[item.answer] == by_id[item.query.clip_id]


def test_every_clip_is_asked_for_once_per_kind(tmp_path):
    questions = read(tmp_path, build_egomcq(held_out(), random.Random(0)))
    for kind in ("inter", "intra"):
        assert set(Counter(item.query.clip_id for item in questions if item.kind == kind).values()) == {1}


def test_intra_choices_are_five_consecutive_clips(tmp_path):
    for item in read(tmp_path, build_egomcq(held_out(), random.Random(0), num_inter=0)):
        times_s = sorted(choice.narration_s for choice in item.choices)
        assert times_s == [times_s[0] + index for index in range(5)]


def test_answers_are_spread_evenly_over_the_five_places(tmp_path):
    questions = read(tmp_path, build_egomcq(held_out(), random.Random(0)))
    for kind in ("inter", "intra"):
        counts = Counter(item.answer for item in questions if item.kind == kind)
        assert sorted(counts.values()) == [14, 14, 14, 15, 15]


def test_the_number_of_questions_can_be_limited(tmp_path):
    questions = read(tmp_path, build_egomcq(held_out(), random.Random(0), num_inter=7, num_intra=3))
    assert Counter(item.kind for item in questions) == {"inter": 7, "intra": 3}


def test_the_same_random_state_builds_the_same_questions():
    assert build_egomcq(held_out(), random.Random(5)) == build_egomcq(held_out(), random.Random(5))


def test_a_video_with_four_clips_gives_no_intra_question():
    document = build_egomcq(held_out(num_videos=1, num_clips=4), random.Random(0))
    assert document == {}


def test_no_question_holds_one_action_in_two_wordings():
    records = held_out()
    again = [
        make_record(
            r.video_uid, r.start_s, r.end_s, r.narration_s + 0.01, r.caption + " again", r.verbs, r.nouns
        )
        for r in records
    ]
    assert all(
        len({(choice["tag_verb"], choice["tag_noun"]) for choice in entry["choices"].values()}) == 5
        for entry in build_egomcq(records + again, random.Random(0)).values()
    )


def test_the_probe_holds_intra_questions_with_the_reversed_verb_on_the_same_noun(tmp_path):
    hit, other_noun, other_verb, inter = question(), question(), question(), question(1)
    hit["choices"]["3"]["tag_verb"] = "[3]"
    other_noun["choices"]["3"] |= {"tag_verb": "[3]", "tag_noun": "[8]"}
    other_verb["choices"]["3"]["tag_verb"] = "[1]"
    inter["choices"]["3"]["tag_verb"] = "[3]"
    questions = read(tmp_path, {"0": hit, "1": other_noun, "2": other_verb, "3": inter})
    assert [item.question_id for item in probe_questions(questions, REVERSED)] == [0]


def test_the_answer_itself_is_no_distractor_of_the_probe(tmp_path):
    entry = question(answer=1)
    entry["choices"]["1"]["tag_verb"] = "[3]"
    assert probe_questions(read(tmp_path, {"0": entry}), REVERSED) == []
