"""What happens in the generated world: objects, verbs, and the valid sequence of actions of every video.

Pure data and arithmetic, no pixels. Each object carries one bit per verb pair (taken away, open, on the left,
turned clockwise). A forward verb takes its bit from 0 to 1, the reversed verb takes it back, so any sequence
is physically valid and the picture of a reversed verb is the picture of the forward verb played backwards.
"""

import random
import uuid
from dataclasses import dataclass
from fractions import Fraction

from pipeline.config import WorldConfig

# Class id = position. Verb 2k is the forward verb of pair k, verb 2k + 1 its exact time reversal.
VERBS = (
    "pick up",
    "put down",
    "open",
    "close",
    "push left",
    "push right",
    "turn clockwise",
    "turn counter-clockwise",
)
REVERSED_VERBS = tuple((2 * pair, 2 * pair + 1) for pair in range(len(VERBS) // 2))
TAKE, OPEN, PUSH, TURN = range(len(REVERSED_VERBS))

NOUNS = ("cup", "bottle", "box", "book", "pan", "jar", "spoon", "brush", "plate", "laptop")
COLOUR_WORDS = {
    "cup": "red",
    "bottle": "green",
    "box": "orange",
    "book": "blue",
    "pan": "black",
    "jar": "purple",
    "spoon": "yellow",
    "brush": "pink",
    "plate": "white",
    "laptop": "grey",
}
NOUNS_WITH_LID = ("box", "book", "jar", "laptop")
NOUNS_WITH_AXIS = ("cup", "bottle", "pan", "spoon", "brush")

ACTION_S = 1.15
GAP_S = (0.3, 0.5)
# How far back a verb and noun must lie before they may come again: five captions in a row then differ.
NO_REPEAT_WITHIN = 4


@dataclass(frozen=True, slots=True)
class PictureFormat:
    """Size in pixels, frames per second, and whether frame times are irregular."""

    width: int
    height: int
    fps: Fraction
    has_variable_rate: bool = False


# Videos take these in turn: several sizes and rates, one portrait, one with a variable frame rate.
PICTURE_FORMATS = (
    PictureFormat(256, 192, Fraction(30)),
    PictureFormat(320, 240, Fraction(25)),
    PictureFormat(288, 216, Fraction(30000, 1001)),
    PictureFormat(256, 192, Fraction(25)),
    PictureFormat(240, 320, Fraction(30)),
    PictureFormat(256, 192, Fraction(30000, 1001)),
    PictureFormat(272, 208, Fraction(30), has_variable_rate=True),
    PictureFormat(320, 180, Fraction(30)),
)


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """One object: noun, rest position in shares of the frame, and its starting bits per verb pair."""

    noun: int
    home_x: float
    home_y: float
    start_bits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Action:
    """One verb applied to one object between two times of the video."""

    start_s: float
    end_s: float
    verb: int
    object_index: int

    @property
    def pair(self) -> int:
        return self.verb // 2

    @property
    def is_reversed(self) -> bool:
        return self.verb % 2 == 1


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """Everything that decides the pixels of one video."""

    video_uid: str
    look_seed: int
    picture: PictureFormat
    duration_s: float
    tempo: float
    objects: tuple[ObjectSpec, ...]
    actions: tuple[Action, ...]
    is_heldout: bool = False


def keyed_random(seed: int, purpose: str, index: int = 0) -> random.Random:
    """Returns a generator that depends on its key alone (text seeds are the same in every process)."""
    return random.Random(f"{seed}/{purpose}/{index}")


def video_specs(config: WorldConfig) -> list[VideoSpec]:
    """Scripts all videos of a world: training videos first, then held-out ones. Same config, same list."""
    num_videos = config.num_train_videos + config.num_heldout_videos
    return [
        _video_spec(config, index, is_heldout=index >= config.num_train_videos) for index in range(num_videos)
    ]


def bits_before(spec: VideoSpec) -> list[tuple[tuple[int, ...], ...]]:
    """Returns, for each action and once more for the end, the bits of every object just before it."""
    bits = [list(item.start_bits) for item in spec.objects]
    states = [tuple(tuple(row) for row in bits)]
    for action in spec.actions:
        bits[action.object_index][action.pair] = 0 if action.is_reversed else 1
        states.append(tuple(tuple(row) for row in bits))
    return states


def _video_spec(config: WorldConfig, index: int, *, is_heldout: bool) -> VideoSpec:
    rng = keyed_random(config.seed, "video", index)
    # The place in its own split decides the format, so that both splits see the whole table.
    place = index - config.num_train_videos if is_heldout else index
    picture = PICTURE_FORMATS[place % len(PICTURE_FORMATS)]
    duration_s = round(rng.uniform(*config.video_s), 2)
    tempo = rng.uniform(0.85, 1.15)
    objects = _place_objects(rng, picture)
    return VideoSpec(
        video_uid=str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        look_seed=rng.getrandbits(32),
        picture=picture,
        duration_s=duration_s,
        tempo=tempo,
        objects=objects,
        actions=_script_actions(rng, objects, duration_s, tempo),
        is_heldout=is_heldout,
    )


def _place_objects(rng: random.Random, picture: PictureFormat) -> tuple[ObjectSpec, ...]:
    """Puts two objects with a lid and two others each into its own quarter of the table."""
    nouns = rng.sample(NOUNS_WITH_LID, 2) + rng.sample([*NOUNS_WITH_AXIS, "plate"], 2)
    rng.shuffle(nouns)
    rows = (0.36, 0.70) if picture.width > picture.height else (0.34, 0.66)
    cells = [(x, y) for y in rows for x in (0.27, 0.73)]
    rng.shuffle(cells)
    objects = []
    for noun, (x, y) in zip(nouns, cells, strict=True):
        start_bits = (0, 0, rng.randrange(2), rng.randrange(2))
        home_x, home_y = x + rng.uniform(-0.015, 0.015), y + rng.uniform(-0.02, 0.02)
        objects.append(ObjectSpec(NOUNS.index(noun), home_x, home_y, start_bits))
    return tuple(objects)


def possible_verbs(noun: str, bits: tuple[int, ...] | list[int]) -> list[int]:
    """Lists the verbs that make sense in a state: what is away can only come back, what is open only shut."""
    if bits[TAKE]:
        return [2 * TAKE + 1]
    if bits[OPEN]:
        return [2 * OPEN + 1]
    pairs = [TAKE, PUSH]
    if noun in NOUNS_WITH_LID:
        pairs.append(OPEN)
    if noun in NOUNS_WITH_AXIS:
        pairs.append(TURN)
    return [2 * pair + bits[pair] for pair in pairs]


def _script_actions(
    rng: random.Random, objects: tuple[ObjectSpec, ...], duration_s: float, tempo: float
) -> tuple[Action, ...]:
    bits = [list(item.start_bits) for item in objects]
    times_used = [0] * len(REVERSED_VERBS)
    done: list[tuple[int, int]] = []
    actions: list[Action] = []
    time_s = tempo * rng.uniform(*GAP_S)
    while True:
        length_s = tempo * ACTION_S * rng.uniform(0.96, 1.04)
        if time_s + length_s + 0.1 > duration_s:
            return tuple(actions)
        recent = set(done[-NO_REPEAT_WITHIN:])
        choices = [
            (verb, which)
            for which, item in enumerate(objects)
            for verb in possible_verbs(NOUNS[item.noun], bits[which])
            if (verb, which) not in recent
        ]
        verb, which = _choose(rng, choices, done, times_used)
        actions.append(Action(round(time_s, 4), round(time_s + length_s, 4), verb, which))
        bits[which][verb // 2] = 1 - verb % 2
        times_used[verb // 2] += 1
        done.append((verb, which))
        time_s += length_s + tempo * rng.uniform(*GAP_S)


def _choose(
    rng: random.Random, choices: list[tuple[int, int]], done: list[tuple[int, int]], times_used: list[int]
) -> tuple[int, int]:
    """Undoes something recent two times out of three, else takes a verb pair that was seldom used."""
    undo = [(verb ^ 1, which) for verb, which in done[-3:] if (verb ^ 1, which) in choices]
    if undo and rng.random() < 0.66:
        return rng.choice(undo)
    pairs = sorted({verb // 2 for verb, _ in choices})
    pair = rng.choices(pairs, weights=[1.0 / (1 + times_used[pair]) for pair in pairs])[0]
    return rng.choice([choice for choice in choices if choice[0] // 2 == pair])
