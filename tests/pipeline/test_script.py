from collections import Counter

import pytest
from pydantic import ValidationError

from pipeline.config import WorldConfig
from pipeline.script import (
    NO_REPEAT_WITHIN,
    NOUNS,
    OPEN,
    PICTURE_FORMATS,
    TAKE,
    VERBS,
    bits_before,
    possible_verbs,
    video_specs,
)

CONFIG = WorldConfig(seed=3, num_train_videos=16, num_heldout_videos=4)
SPECS = video_specs(CONFIG)


def test_the_same_seed_writes_the_same_script_and_another_seed_another_one():
    assert video_specs(CONFIG) == SPECS
    other = video_specs(WorldConfig(seed=4, num_train_videos=16, num_heldout_videos=4))
    assert {spec.video_uid for spec in other}.isdisjoint(spec.video_uid for spec in SPECS)


def test_adding_videos_for_training_leaves_the_first_ones_as_they_are():
    longer = video_specs(WorldConfig(seed=3, num_train_videos=20, num_heldout_videos=4))
    assert longer[:16] == SPECS[:16]


def test_every_action_is_possible_in_the_state_it_finds():
    for spec in SPECS:
        for action, bits in zip(spec.actions, bits_before(spec), strict=False):
            noun = NOUNS[spec.objects[action.object_index].noun]
            assert action.verb in possible_verbs(noun, bits[action.object_index])


def test_what_is_away_can_only_come_back_and_what_is_open_can_only_close():
    assert possible_verbs("cup", (1, 0, 0, 0)) == [2 * TAKE + 1]
    assert possible_verbs("box", (0, 1, 0, 0)) == [2 * OPEN + 1]
    assert [VERBS[verb] for verb in possible_verbs("cup", (0, 0, 1, 0))] == [
        "pick up",
        "push right",
        "turn clockwise",
    ]


def test_actions_do_not_overlap_and_lie_inside_the_video():
    for spec in SPECS:
        ends_s = [0.0, *(action.end_s for action in spec.actions)]
        assert all(action.start_s > end_s for action, end_s in zip(spec.actions, ends_s, strict=False))
        assert ends_s[-1] < spec.duration_s


def test_five_actions_in_a_row_are_never_the_same_twice():
    for spec in SPECS:
        names = [(action.verb, action.object_index) for action in spec.actions]
        for start in range(len(names)):
            window = names[start : start + NO_REPEAT_WITHIN + 1]
            assert len(set(window)) == len(window)


def test_a_verb_and_its_reversal_occur_about_equally_often():
    counts = Counter(action.verb for spec in SPECS for action in spec.actions)
    for pair in range(4):
        forward, backward = counts[2 * pair], counts[2 * pair + 1]
        assert forward + backward > 60
        assert abs(forward - backward) < 0.2 * (forward + backward)


def test_the_formats_hold_one_portrait_one_variable_rate_and_three_frame_rates():
    assert sum(item.height > item.width for item in PICTURE_FORMATS) == 1
    assert sum(item.has_variable_rate for item in PICTURE_FORMATS) == 1
    assert {round(float(item.fps), 2) for item in PICTURE_FORMATS} == {25.0, 29.97, 30.0}
    assert all(item.width % 2 == 0 and item.height % 2 == 0 for item in PICTURE_FORMATS)


def test_a_length_range_the_wrong_way_round_is_refused():
    with pytest.raises(ValidationError, match="expected 4 <= shortest <= longest"):
        WorldConfig(video_s=(50.0, 40.0))
