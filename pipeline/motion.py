"""How everything in the generated world moves: head, objects, lids, hand. Geometry only, nothing is drawn.

Positions are in pixels of the table picture. What an action moves is a function of its phase alone, so that a
reversed verb, whose phase runs backwards, takes the same poses in opposite order.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.objects import ObjectSprites
from pipeline.script import NOUNS, NOUNS_WITH_AXIS, OPEN, PUSH, TAKE, TURN, VideoSpec
from pipeline.sprites import Sprite

Affine = NDArray[np.float64]

# Phases of an action: the hand arrives, does it, leaves.
REACHED, RELEASED = 0.32, 0.68
LIFT_FROM, OUT_OF_SIGHT = 0.38, 0.78
TURN_ANGLE = math.radians(60)
# Sides of the table in sides of the picture: the eye sees about half of the table at a time.
TABLE_SPREAD = 2.0
# The eye rests a little below the object, where the hand is, in shares of the height of the picture.
GAZE_BELOW = 0.06


@dataclass(frozen=True, slots=True)
class Pose:
    """Where an object is: centre in table pixels, angle in radians, scale, openness of its lid (0..1)."""

    x: float
    y: float
    angle: float
    scale: float
    openness: float


@dataclass(frozen=True, slots=True)
class HandPose:
    """Fingertips in table pixels, direction of the arm in radians from straight down, grip, size."""

    x: float
    y: float
    angle: float
    is_gripping: bool
    scale: float


def smooth(value: float) -> float:
    """Eases 0..1 with zero speed at both ends; clamps outside."""
    value = min(1.0, max(0.0, value))
    return value * value * (3 - 2 * value)


def similarity(x: float, y: float, angle: float, scale_x: float, scale_y: float) -> Affine:
    """Returns the 3 x 3 matrix that scales, turns (clockwise on screen) and moves."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos * scale_x, -sin * scale_y, x], [sin * scale_x, cos * scale_y, y], [0.0, 0.0, 1.0]])


class Motion:
    """Positions of one video's things at any time; everything but the spec comes from its look seed."""

    def __init__(self, spec: VideoSpec, rng: np.random.Generator) -> None:
        self.spec = spec
        self.view_width, self.view_height = spec.picture.width, spec.picture.height
        self.width = round(TABLE_SPREAD * self.view_width)
        self.height = round(TABLE_SPREAD * self.view_height)
        self.margin = round(0.14 * max(self.view_width, self.view_height))
        self.unit = 0.5 * 0.31 * min(self.width, self.height * 0.98) * rng.uniform(0.95, 1.07)
        self.home_angles = rng.uniform(-0.12, 0.12, len(spec.objects))
        self.drift = rng.uniform(0, 2 * np.pi, (4, 2))
        self.drift_hz = rng.uniform((0.07, 0.16), (0.13, 0.3), (4, 2))
        self.starts = np.array([action.start_s for action in spec.actions])

    def camera(self, time_s: float) -> Affine:
        """Head motion: it looks where the hand acts, with a slow drift, a little roll, near and far."""
        waves = np.sin(2 * np.pi * self.drift_hz * time_s + self.drift) @ np.array([0.65, 0.35])
        size = min(self.view_width, self.view_height)
        move_x, move_y = 0.035 * size * waves[0], 0.03 * size * waves[1]
        middle_x, middle_y = self._gaze_at(time_s)
        zoom = 1 + 0.025 * waves[3]
        turn = similarity(0, 0, 0.035 * waves[2], zoom, zoom)
        turn[0, 2] = self.view_width / 2 + move_x - turn[0, 0] * middle_x - turn[0, 1] * middle_y
        turn[1, 2] = self.view_height / 2 + move_y - turn[1, 0] * middle_x - turn[1, 1] * middle_y
        return turn

    def _gaze_at(self, time_s: float) -> tuple[float, float]:
        """Returns the table pixel the eye rests on; it moves on while no action is under way."""
        actions = self.spec.actions
        current = max(0, int(np.searchsorted(self.starts, time_s, side="right")) - 1)
        x, y = self._gaze(actions[current].object_index)
        if time_s <= actions[current].end_s or current + 1 == len(actions):
            return x, y
        following = actions[current + 1]
        gap_s = following.start_s - actions[current].end_s
        share = smooth((time_s - actions[current].end_s) / gap_s)
        next_x, next_y = self._gaze(following.object_index)
        return x + share * (next_x - x), y + share * (next_y - y)

    def _gaze(self, index: int) -> tuple[float, float]:
        """Returns where the eye rests while this object is acted on: near its home, never past the table."""
        item = self.spec.objects[index]
        half_x, half_y = 0.5 * self.view_width / self.width, 0.5 * self.view_height / self.height
        x = min(1 - half_x, max(half_x, item.home_x))
        y = min(1 - half_y, max(half_y, item.home_y + GAZE_BELOW / TABLE_SPREAD))
        return self.margin + x * self.width, self.margin + y * self.height

    def pose(self, index: int, bits: tuple[float, ...]) -> Pose:
        """Returns where an object rests; bits between 0 and 1 are on the way."""
        item = self.spec.objects[index]
        reach = min(0.118 * self.width, 1.3 * self.unit)
        return Pose(
            x=self.margin + item.home_x * self.width + reach * (1 - 2 * bits[PUSH]),
            y=self.margin + item.home_y * self.height,
            angle=float(self.home_angles[index])
            + (TURN_ANGLE * (2 * bits[TURN] - 1) if self._turns(index) else 0.0),
            scale=1.0,
            openness=bits[OPEN],
        )

    def _turns(self, index: int) -> bool:
        return NOUNS[self.spec.objects[index].noun] in NOUNS_WITH_AXIS

    def lid_transform(self, sprites: ObjectSprites, openness: float) -> tuple[Sprite, Affine]:
        """Returns the visible face of the lid and its place relative to the body."""
        lid = sprites.lid
        assert lid is not None
        if lid.axis == "off":
            lift = math.sin(math.pi * openness)
            move = similarity(
                0.95 * openness * self.unit, -0.95 * openness * self.unit, 0.0, 1 + 0.2 * lift, 1 + 0.2 * lift
            )
            return lid.outer, move
        # From above a lid at angle theta covers cos(theta) of its length, past 90 degrees with its inside up.
        squash = math.cos(openness * math.radians(155))
        if abs(squash) < 0.06:
            squash = math.copysign(0.06, squash)
        hinge = lid.hinge * self.unit
        sprite = lid.outer if squash > 0 else lid.inner
        if lid.axis == "y":
            return sprite, similarity(0.0, hinge * (1 - squash), 0.0, 1.0, squash)
        return sprite, similarity(hinge * (1 - squash), 0.0, 0.0, squash, 1.0)

    def carried(self, index: int, pose: Pose, phase: float) -> Pose:
        """Lifts an object towards the viewer and then down out of the picture."""
        lift = min(1.0, max(0.0, (phase - LIFT_FROM) / (OUT_OF_SIGHT - LIFT_FROM)))
        middle_x, middle_y = self._gaze(index)
        away_y = middle_y + self.view_height / 2 + 2.2 * self.unit
        # An object near the lower border starts later, so that it stays in sight as long as a far one.
        nearness = 0.5 + (pose.y - middle_y) / self.view_height
        way = lift ** (1.6 + 1.6 * nearness)
        return Pose(
            x=pose.x + 0.45 * way * (middle_x - pose.x),
            y=pose.y + way * (away_y - pose.y),
            angle=pose.angle,
            scale=1 + 0.5 * lift,
            openness=pose.openness,
        )

    def side(self, index: int) -> str:
        """Says which hand acts on an object."""
        return "right" if self.spec.objects[index].home_x > 0.5 else "left"

    def _grip_point(self, sprites: ObjectSprites, pair: int, pose: Pose) -> tuple[float, float]:
        """Where the fingertips hold the object, in table pixels."""
        if pair == OPEN:
            assert sprites.lid is not None
            _, local = self.lid_transform(sprites, pose.openness)
            point = np.array([sprites.lid.grip[0] * self.unit, sprites.lid.grip[1] * self.unit, 1.0])
            x, y, _ = similarity(pose.x, pose.y, pose.angle, pose.scale, pose.scale) @ local @ point
            return float(x), float(y)
        # The hand comes from below whatever way the object points.
        reach = (0.3 if pair == TAKE else 0.55) * self.unit * pose.scale
        return pose.x, pose.y + reach

    def hand_pose(self, index: int, sprites: ObjectSprites, pair: int, phase: float, pose: Pose) -> HandPose:
        """Returns where the hand is that acts on an object in the given pose."""
        x, y = self._grip_point(sprites, pair, pose)
        middle_x, middle_y = self._gaze(index)
        shoulder_x = middle_x + self.view_width * (0.18 if self.side(index) == "right" else -0.18)
        shoulder_y = middle_y + 1.2 * self.view_height
        angle = 0.8 * math.atan2(x - shoulder_x, shoulder_y - y)
        if pair == TURN:
            swing = 0.95 * (pose.angle - float(self.home_angles[index]))
            angle = swing
            reach = 0.55 * self.unit
            x, y = pose.x - reach * math.sin(swing), pose.y + reach * math.cos(swing)
        away = 0.0
        if phase < REACHED:
            away = (1 - phase / REACHED) ** 1.7
        elif phase > RELEASED and pair != TAKE:
            away = ((phase - RELEASED) / (1 - RELEASED)) ** 1.7
        below_y = middle_y + 0.6 * self.view_height
        distance = (below_y - y + 0.4 * self.unit) / max(0.45, math.cos(angle))
        is_gripping = phase >= REACHED - 0.03 and (phase <= RELEASED + 0.03 or pair == TAKE)
        return HandPose(
            x=x - math.sin(angle) * distance * away,
            y=y + math.cos(angle) * distance * away,
            angle=angle,
            is_gripping=is_gripping,
            scale=pose.scale**0.6,
        )
