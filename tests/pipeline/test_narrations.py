import json

import pytest

from pipeline.config import WorldConfig
from pipeline.errors import DataError
from pipeline.narrations import PASS_NAMES, Taxonomy, read_narrations, read_taxonomy
from pipeline.script import video_specs
from pipeline.wording import narration_document, world_taxonomy

TAXONOMY = world_taxonomy()


def write(path, value):
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("text", "verb", "noun"),
    [
        ("#C C picks up the red cup", "pick up", "cup"),
        ("#C C lifts the mug", "pick up", "cup"),
        ("#C C takes the jar from the table", "pick up", "jar"),
        ("#C C puts the pan down", "put down", "pan"),
        ("#C C uncovers the box", "open", "box"),
        ("#C C covers the box", "close", "box"),
        ("#C C slides the book left", "push left", "book"),
        ("#C C moves the dish to the right", "push right", "plate"),
        ("#C C rotates the bottle clockwise", "turn clockwise", "bottle"),
        ("#C C turns the pan counter-clockwise.", "turn counter-clockwise", "pan"),
        ("#C C rotates the spoon anticlockwise", "turn counter-clockwise", "spoon"),
        ("#C C moving the brush to the left", "push left", "brush"),
    ],
)
def test_words_find_their_one_class(text, verb, noun):
    assert [TAXONOMY.verbs[index] for index in TAXONOMY.verb_ids(text)] == [verb]
    assert [TAXONOMY.nouns[index] for index in TAXONOMY.noun_ids(text)] == [noun]


def test_a_text_without_known_words_has_no_class():
    assert TAXONOMY.verb_ids("#C C looks around") == ()
    assert TAXONOMY.noun_ids("#C C stares at the laptopper") == ()


def test_classes_come_in_order_of_appearance():
    assert Taxonomy(("cut",), ("bread", "knife")).noun_ids("takes a knife and cuts bread") == (1, 0)


def test_every_narration_of_the_world_has_the_class_of_its_action():
    specs = video_specs(WorldConfig(seed=0, num_train_videos=4, num_heldout_videos=2))
    videos = narration_document(specs)["videos"]
    for spec in specs:
        for name in PASS_NAMES:
            rows = videos[spec.video_uid][name]["narrations"]
            assert len(rows) == len(spec.actions)
            for row, action in zip(rows, spec.actions, strict=True):
                assert TAXONOMY.verb_ids(row["narration_text"]) == (action.verb,)
                assert TAXONOMY.noun_ids(row["narration_text"]) == (spec.objects[action.object_index].noun,)
                assert action.start_s < row["timestamp_sec"] < action.end_s
                assert row["narration_text"].startswith("#C C ")


def test_the_two_annotators_word_things_differently():
    spec = video_specs(WorldConfig(num_train_videos=1, num_heldout_videos=0))[0]
    entry = narration_document([spec])["videos"][spec.video_uid]
    texts = [[row["narration_text"] for row in entry[name]["narrations"]] for name in PASS_NAMES]
    assert all(first != second for first, second in zip(*texts, strict=True))


def test_a_taxonomy_survives_writing_and_reading(tmp_path):
    assert read_taxonomy(write(tmp_path / "taxonomy.json", TAXONOMY.to_json())) == TAXONOMY


def test_a_taxonomy_needs_no_synonyms_and_no_reversed_verbs(tmp_path):
    read = read_taxonomy(write(tmp_path / "t.json", {"verbs": ["cut"], "nouns": ["bread"]}))
    assert read.reversed_verbs == ()
    assert read.verb_ids("#C C cutting bread") == ()
    assert read.verb_ids("#C C cuts bread") == (0,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"verbs": ["cut"]}, "'nouns' is None"),
        ({"verbs": ["cut", "cut"], "nouns": ["bread"]}, r"\['cut'\] twice"),
        (
            {"verbs": ["cut"], "nouns": ["bread"], "reversed_verbs": [[0, 1]]},
            r"reversed_verbs holds \[0, 1\]",
        ),
        ({"verbs": ["cut"], "nouns": ["bread"], "noun_synonyms": {"roll": ["bun"]}}, r"\['roll'\]"),
        ([], "expected a JSON object"),
    ],
)
def test_a_wrong_taxonomy_is_refused(tmp_path, value, message):
    with pytest.raises(DataError, match=message):
        read_taxonomy(write(tmp_path / "t.json", value))


def test_narrations_come_sorted_by_time_and_keep_their_number(tmp_path):
    rows = [{"timestamp_sec": 2.0, "narration_text": "b"}, {"timestamp_sec": "1.5", "narration_text": "a"}]
    value = {
        "videos": {
            "v": {"narration_pass_1": {"narrations": rows}, "duration_sec": 9},
            "w": {"status": "redacted"},
        }
    }
    first, second = read_narrations(write(tmp_path / "n.json", value))
    assert [(item.index, item.text) for item in first.passes["narration_pass_1"]] == [(1, "a"), (0, "b")]
    assert first.duration_s == 9.0
    assert (second.passes, second.duration_s) == ({}, None)


def test_a_narration_without_a_time_is_named(tmp_path):
    value = {"videos": {"v": {"narration_pass_2": {"narrations": [{"narration_text": "a"}]}}}}
    with pytest.raises(DataError, match="video v, narration_pass_2, narration 0"):
        read_narrations(write(tmp_path / "n.json", value))


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no narrations file"):
        read_narrations(tmp_path / "n.json")
    (tmp_path / "n.json").write_text("{")
    with pytest.raises(DataError, match="is not a JSON file"):
        read_narrations(tmp_path / "n.json")
