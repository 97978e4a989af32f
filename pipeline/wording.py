"""Narrations of the generated world: two annotators, two wordings, slightly different times.

The first annotator always says the same thing about the same action and names the colour; the second varies
verbs and nouns. The taxonomy lists every word either of them uses.
"""

import uuid
from collections.abc import Sequence
from random import Random
from typing import Any

from pipeline.narrations import PASS_NAMES, Taxonomy
from pipeline.script import COLOUR_WORDS, NOUNS, REVERSED_VERBS, VERBS, Action, VideoSpec, keyed_random

_FIRST = {
    "pick up": "picks up the {}",
    "put down": "puts down the {}",
    "open": "opens the {}",
    "close": "closes the {}",
    "push left": "pushes the {} to the left",
    "push right": "pushes the {} to the right",
    "turn clockwise": "turns the {} clockwise",
    "turn counter-clockwise": "turns the {} counter-clockwise",
}
_SECOND = {
    "pick up": ("lifts the {}", "takes the {} from the table"),
    "put down": ("places the {} on the table", "puts the {} down"),
    "open": ("opens up the {}", "uncovers the {}"),
    "close": ("shuts the {}", "covers the {}"),
    "push left": ("slides the {} left", "moves the {} to the left"),
    "push right": ("slides the {} right", "moves the {} to the right"),
    "turn clockwise": ("rotates the {} clockwise", "turns the {} clockwise"),
    "turn counter-clockwise": ("rotates the {} anticlockwise", "turns the {} counter-clockwise"),
}
_VERB_SYNONYMS = {
    "pick up": ("pick ... up", "lift", "take"),
    "put down": ("put ... down", "place"),
    "open": ("uncover",),
    "close": ("shut", "cover"),
    "push left": ("push ... left", "slide ... left", "move ... left"),
    "push right": ("push ... right", "slide ... right", "move ... right"),
    "turn clockwise": ("turn ... clockwise", "rotate ... clockwise"),
    "turn counter-clockwise": (
        "turn ... counter-clockwise",
        "turn ... anticlockwise",
        "rotate ... counter-clockwise",
        "rotate ... anticlockwise",
    ),
}
_NOUN_SYNONYMS = {
    "cup": ("mug",),
    "pan": ("skillet",),
    "plate": ("dish",),
    "laptop": ("computer",),
    "jar": ("pot",),
}
# Annotators do not hit the middle of an action exactly; shares of the length of the action.
_TIME_SPREAD = (0.05, 0.08)


def world_taxonomy() -> Taxonomy:
    """Returns the classes of the generated world."""
    return Taxonomy(VERBS, NOUNS, REVERSED_VERBS, _VERB_SYNONYMS, _NOUN_SYNONYMS)


def narration_document(specs: Sequence[VideoSpec]) -> dict[str, Any]:
    """Returns what narration.json holds: every video with two passes, in Ego4D's format."""
    return {"version": "generated-1", "videos": {spec.video_uid: _video_entry(spec) for spec in specs}}


def _video_entry(spec: VideoSpec) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "status": "complete",
        "duration_sec": round(float(int(spec.duration_s * spec.picture.fps) / spec.picture.fps), 6),
    }
    for which, name in enumerate(PASS_NAMES):
        rng = keyed_random(spec.look_seed, name)
        rows = [_narration(spec, action, which, rng) for action in spec.actions]
        entry[name] = {"summaries": [], "narrations": rows}
    return entry


def _narration(spec: VideoSpec, action: Action, which: int, rng: Random) -> dict[str, Any]:
    length_s = action.end_s - action.start_s
    time_s = (action.start_s + action.end_s) / 2 + length_s * rng.uniform(-1, 1) * _TIME_SPREAD[which]
    noun = NOUNS[spec.objects[action.object_index].noun]
    verb = VERBS[action.verb]
    if which == 0:
        text = _FIRST[verb].format(f"{COLOUR_WORDS[noun]} {noun}")
    else:
        text = rng.choice(_SECOND[verb]).format(rng.choice((noun, *_NOUN_SYNONYMS.get(noun, ()))))
    return {
        "timestamp_sec": round(time_s, 7),
        "timestamp_frame": round(time_s * spec.picture.fps),
        "narration_text": f"#C C {text}",
        "annotation_uid": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    }
