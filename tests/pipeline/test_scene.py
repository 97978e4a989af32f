from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import WorldConfig
from pipeline.motion import similarity
from pipeline.objects import draw_object
from pipeline.scene import Scene, paste
from pipeline.script import NOUNS, REVERSED_VERBS, Action, video_specs
from pipeline.sprites import Sprite
from pipeline.world import render_clip

SPEC = video_specs(WorldConfig(seed=1, num_train_videos=1, num_heldout_videos=0))[0]


def still_scene(spec):
    """A scene seen by a head that does not drift, so that frames of different times can be compared."""
    scene = Scene(spec)
    scene.motion.drift_hz[:] = 0.0
    return scene


def scene_of(pair, *, is_reversed):
    lid = next(
        index
        for index, item in enumerate(SPEC.objects)
        if NOUNS[item.noun] in ("box", "book", "jar", "laptop")
    )
    axis = next(
        index
        for index, item in enumerate(SPEC.objects)
        if NOUNS[item.noun] in ("cup", "bottle", "pan", "spoon", "brush")
    )
    which = axis if pair == 3 else lid
    bits = [0, 0, 0, 0]
    bits[pair] = int(is_reversed)
    objects = tuple(
        replace(item, start_bits=tuple(bits)) if index == which else item
        for index, item in enumerate(SPEC.objects)
    )
    action = Action(1.0, 2.0, 2 * pair + int(is_reversed), which)
    return still_scene(replace(SPEC, objects=objects, actions=(action,)))


@pytest.mark.parametrize("pair", range(len(REVERSED_VERBS)))
def test_a_reversed_verb_shows_the_same_frames_in_opposite_order(pair):
    forward, backward = scene_of(pair, is_reversed=False), scene_of(pair, is_reversed=True)
    for phase in (0.1, 0.25, 0.5, 0.75, 0.9):
        np.testing.assert_array_equal(forward.frame_at(1.0 + phase), backward.frame_at(2.0 - phase))


@pytest.mark.parametrize("pair", range(len(REVERSED_VERBS)))
def test_four_frames_of_an_action_differ_clearly(pair):
    scene = scene_of(pair, is_reversed=False)
    frames = [scene.frame_at(1.0 + phase).astype(int) for phase in (0.16, 0.39, 0.61, 0.84)]
    for index in range(3):
        changed = np.abs(frames[index + 1] - frames[index]).max(axis=2) > 40
        assert changed.mean() > 0.02


@pytest.mark.parametrize("pair", range(len(REVERSED_VERBS)))
def test_an_action_leaves_the_state_that_the_reversal_starts_from(pair):
    after = scene_of(pair, is_reversed=False).frame_at(2.5)
    before = scene_of(pair, is_reversed=True).frame_at(0.5)
    np.testing.assert_array_equal(after, before)
    assert (after != scene_of(pair, is_reversed=False).frame_at(0.5)).any()


def test_a_frame_does_not_depend_on_the_frames_drawn_before():
    in_order = Scene(SPEC)
    frames = [in_order.frame_at(index * 0.4) for index in range(12)]
    alone = Scene(SPEC)
    for index in (11, 3, 7, 0):
        np.testing.assert_array_equal(alone.frame_at(index * 0.4), frames[index])


def test_objects_differ_in_mean_colour():
    colours = []
    for noun in NOUNS:
        sprites = draw_object(noun, 20.0, lambda colour: colour)
        picture = (sprites.lid.outer if sprites.lid else sprites.body).rgba.astype(float)
        solid = picture[..., 3] > 250
        colours.append(picture[solid][:, :3].mean(axis=0))
    for index, colour in enumerate(colours):
        for other in colours[:index]:
            assert np.abs(colour - other).max() > 18


def test_pasting_blends_premultiplied_colour_by_its_alpha():
    frame = np.full((4, 4, 4), 200, np.uint8)
    sprite = Sprite(np.full((2, 2, 4), (50, 0, 0, 128), np.uint8), 0.0, 0.0)
    paste(frame, sprite, similarity(1, 1, 0.0, 1.0, 1.0))
    # 200 * (255 - 128) / 255 = 99.6
    np.testing.assert_array_equal(frame[1, 1, :3], [150, 100, 100])
    np.testing.assert_array_equal(frame[0, 0, :3], [200, 200, 200])


def test_pasting_outside_the_frame_changes_nothing():
    frame = np.full((4, 4, 4), 7, np.uint8)
    paste(frame, Sprite(np.full((2, 2, 4), 255, np.uint8), 0.0, 0.0), similarity(50, -50, 0.3, 1.0, 1.0))
    assert (frame == 7).all()


def test_a_clip_is_drawn_at_segment_midpoints_in_the_size_asked_for():
    frames = render_clip(SPEC, 2.0, 3.0, 4, height=96, width=128)
    assert frames.shape == (4, 96, 128, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(render_clip(SPEC, 2.0, 3.0, 2)[0], Scene(SPEC).frame_at(2.25))
