"""Draws the generated world at any instant of a video: camera, resting objects, acting object and hand.

The phase of an action runs from 0 to 1 for a forward verb and from 1 to 0 for its reversal, and everything
that moves is a function of the phase alone; that is what makes two reversed verbs show the same pictures in
opposite order. Only the head moves on regardless: it drifts a little, and between two actions it turns to the
object that comes next, as people look at what they are about to touch.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.objects import ObjectSprites, draw_object
from pipeline.script import NOUNS, OPEN, PUSH, TAKE, TURN, VideoSpec, bits_before
from pipeline.sprites import Colour, Image, Sprite, draw_hand, draw_table, mirrored, shade

Affine = NDArray[np.float64]

# Phases of an action: the hand arrives, does it, leaves.
REACHED, RELEASED = 0.32, 0.68
LIFT_FROM = 0.4
TURN_ANGLE = math.radians(60)
# Sides of the table in sides of the picture: the eye sees about half of the table at a time.
TABLE_SPREAD = 1.45
# The eye rests a little below the object, where the hand is, in shares of the height of the picture.
GAZE_BELOW = 0.06
SKIN_TONES: tuple[Colour, ...] = (
    (236, 188, 160),
    (214, 160, 124),
    (176, 120, 86),
    (128, 84, 58),
    (92, 60, 42),
)
SLEEVES: tuple[Colour, ...] = (
    (60, 70, 96),
    (120, 40, 44),
    (44, 90, 70),
    (200, 200, 204),
    (70, 60, 54),
    (170, 140, 60),
)


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


def paste(frame_HWC: Image, sprite: Sprite, matrix: Affine) -> None:
    """Blends a sprite into an RGBA frame; matrix takes sprite pixels about its origin to frame pixels."""
    rgba = sprite.rgba
    height, width = rgba.shape[:2]
    shift = np.array([[1.0, 0.0, -sprite.origin_x], [0.0, 1.0, -sprite.origin_y], [0.0, 0.0, 1.0]])
    whole = matrix @ shift
    corners = whole[:2] @ np.array([[0, width, width, 0], [0, 0, height, height], [1, 1, 1, 1]], np.float64)
    left, top = max(0, math.floor(corners[0].min())), max(0, math.floor(corners[1].min()))
    right = min(frame_HWC.shape[1], math.ceil(corners[0].max()) + 1)
    bottom = min(frame_HWC.shape[0], math.ceil(corners[1].max()) + 1)
    if right - left < 1 or bottom - top < 1:
        return
    whole[0, 2] -= left
    whole[1, 2] -= top
    warped = cv2.warpAffine(rgba, whole[:2], (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    region = frame_HWC[top:bottom, left:right]
    shine_through = cv2.cvtColor(cv2.bitwise_not(cv2.extractChannel(warped, 3)), cv2.COLOR_GRAY2RGBA)
    cv2.add(cv2.multiply(region, shine_through, scale=1 / 255), warped, dst=region)


class Scene:
    """One video, ready to be drawn at any time. Cheapest in time order: the resting table is kept."""

    def __init__(self, spec: VideoSpec) -> None:
        self.spec = spec
        self.view_width, self.view_height = spec.picture.width, spec.picture.height
        self.width = round(TABLE_SPREAD * self.view_width)
        self.height = round(TABLE_SPREAD * self.view_height)
        rng = np.random.default_rng(spec.look_seed)
        self.margin = round(0.14 * max(self.view_width, self.view_height))
        self.table = draw_table(rng, self.width + 2 * self.margin, self.height + 2 * self.margin)
        self.unit = 0.5 * 0.31 * min(self.width, self.height * 0.98) * rng.uniform(0.95, 1.07)
        self.light = rng.uniform(0.86, 1.1) * (1 + rng.uniform(-0.05, 0.05, 3))
        self.sprites = [draw_object(NOUNS[item.noun], self.unit, self._tint(rng)) for item in spec.objects]
        skin = self._lit(SKIN_TONES[rng.integers(len(SKIN_TONES))])
        self.sleeve = self._lit(SLEEVES[rng.integers(len(SLEEVES))])
        right = [draw_hand(self.unit * 1.12, skin, is_gripping=grip) for grip in (False, True)]
        self.hands = {"right": right, "left": [mirrored(sprite) for sprite in right]}
        self.home_angles = rng.uniform(-0.12, 0.12, len(spec.objects))
        self.drift = rng.uniform(0, 2 * np.pi, (4, 2))
        self.drift_hz = rng.uniform((0.07, 0.16), (0.13, 0.3), (4, 2))
        # Pictures have four channels throughout: OpenCV warps four bytes three times as fast as three.
        lit = np.clip(self.table * self.light, 0, 255).astype(np.uint8)
        self.table = np.dstack([lit, np.full(lit.shape[:2], 255, np.uint8)])
        self.bits = bits_before(spec)
        self.starts = np.array([action.start_s for action in spec.actions])
        self._resting_key: tuple[int, int] | None = None
        self._resting = self.table

    def _lit(self, colour: Colour) -> Colour:
        red, green, blue = (int(min(255.0, max(0.0, c * g))) for c, g in zip(colour, self.light, strict=True))
        return red, green, blue

    def _tint(self, rng: np.random.Generator):
        gains = rng.uniform(0.91, 1.09, 3)

        def tint(colour: Colour) -> Colour:
            red, green, blue = (int(min(255.0, c * g)) for c, g in zip(self._lit(colour), gains, strict=True))
            return red, green, blue

        return tint

    def frame_at(self, time_s: float) -> Image:
        """Draws the frame of one instant: HWC uint8 RGB."""
        frame = cv2.cvtColor(self.rgba_frame_at(time_s), cv2.COLOR_RGBA2RGB)
        return np.asarray(frame, np.uint8)

    def rgba_frame_at(self, time_s: float) -> Image:
        """Draws the frame of one instant as HWC uint8 RGBA, opaque; the form that is fastest to encode."""
        before = int(np.searchsorted(self.starts, time_s, side="right")) - 1
        action = self.spec.actions[before] if before >= 0 else None
        if action is not None and time_s > action.end_s:
            action = None
        camera = self._camera(time_s)
        acting = -1 if action is None else action.object_index
        resting = self._resting_table(before + (action is None), acting)
        frame = np.empty((self.view_height, self.view_width, 4), np.uint8)
        size = (self.view_width, self.view_height)
        cv2.warpAffine(resting, camera[:2], size, dst=frame, flags=cv2.INTER_LINEAR)
        if action is not None:
            phase = (time_s - action.start_s) / (action.end_s - action.start_s)
            phase = 1 - phase if action.is_reversed else phase
            self._draw_acting(frame, camera, self.bits[before], acting, action.pair, phase)
        return frame

    def _camera(self, time_s: float) -> Affine:
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

    def _resting_table(self, step: int, acting: int) -> Image:
        """Returns the table with every object but the acting one; drawn once per state."""
        if self._resting_key != (step, acting):
            self._resting = self.table.copy()
            for index in range(len(self.spec.objects)):
                bits = self.bits[step][index]
                if index != acting and not bits[TAKE]:
                    self._draw_object(self._resting, np.eye(3), index, self._pose(index, bits))
            self._resting_key = (step, acting)
        return self._resting

    def _pose(self, index: int, bits: tuple[float, ...]) -> Pose:
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
        return self.sprites[index].lid is None and NOUNS[self.spec.objects[index].noun] != "plate"

    def _draw_object(self, image: Image, camera: Affine, index: int, pose: Pose) -> None:
        sprites = self.sprites[index]
        placed = camera @ similarity(pose.x, pose.y, pose.angle, pose.scale, pose.scale)
        paste(image, sprites.body, placed)
        if sprites.lid is not None:
            sprite, local = self._lid_transform(sprites, pose.openness)
            paste(image, sprite, placed @ local)

    def _lid_transform(self, sprites: ObjectSprites, openness: float) -> tuple[Sprite, Affine]:
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

    def _draw_acting(
        self,
        frame: Image,
        camera: Affine,
        bits: tuple[tuple[int, ...], ...],
        index: int,
        pair: int,
        phase: float,
    ) -> None:
        done = smooth((phase - REACHED) / (RELEASED - REACHED))
        progress = tuple(done if which == pair else float(bit) for which, bit in enumerate(bits[index]))
        pose = self._pose(index, progress)
        if pair == TAKE:
            pose = self._carried(index, pose, phase)
        self._draw_object(frame, camera, index, pose)
        item = self.spec.objects[index]
        side = "right" if item.home_x > 0.5 else "left"
        hand = self._hand_pose(index, pair, phase, pose, side)
        self._draw_arm(frame, camera, hand)
        sprite = self.hands[side][int(hand.is_gripping)]
        paste(frame, sprite, camera @ similarity(hand.x, hand.y, hand.angle, hand.scale, hand.scale))

    def _carried(self, index: int, pose: Pose, phase: float) -> Pose:
        """Lifts an object towards the viewer and then down out of the picture."""
        lift = max(0.0, (phase - LIFT_FROM) / (1 - LIFT_FROM))
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

    def _grip_point(self, index: int, pair: int, pose: Pose) -> tuple[float, float]:
        """Where the fingertips hold the object, in table pixels."""
        sprites = self.sprites[index]
        if pair == OPEN:
            assert sprites.lid is not None
            _, local = self._lid_transform(sprites, pose.openness)
            point = np.array([sprites.lid.grip[0] * self.unit, sprites.lid.grip[1] * self.unit, 1.0])
            x, y, _ = similarity(pose.x, pose.y, pose.angle, pose.scale, pose.scale) @ local @ point
            return float(x), float(y)
        # The hand comes from below whatever way the object points.
        reach = (0.3 if pair == TAKE else 0.55) * self.unit * pose.scale
        return pose.x, pose.y + reach

    def _hand_pose(self, index: int, pair: int, phase: float, pose: Pose, side: str) -> HandPose:
        x, y = self._grip_point(index, pair, pose)
        middle_x, middle_y = self._gaze(index)
        shoulder_x = middle_x + self.view_width * (0.18 if side == "right" else -0.18)
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

    def _draw_arm(self, frame: Image, camera: Affine, hand: HandPose) -> None:
        """Draws the sleeve from the wrist to beyond the border of the picture."""
        unit = self.unit * hand.scale
        wrist, elbow = 1.9 * unit, 1.9 * unit + 1.6 * max(self.width, self.height)
        matrix = camera @ similarity(hand.x, hand.y, hand.angle, 1.0, 1.0)
        for half, colour in (
            (0.62, shade(self.sleeve, 0.6)),
            (0.54, self.sleeve),
            (0.2, shade(self.sleeve, 1.18)),
        ):
            near, far = half * unit, 1.35 * half * unit
            corners = np.array([[-near, near, far, -far], [wrist, wrist, elbow, elbow], [1.0, 1.0, 1.0, 1.0]])
            points = np.round((matrix[:2] @ corners).T * 16).astype(np.int32)
            cv2.fillConvexPoly(frame, points, (*colour, 255), cv2.LINE_AA, shift=4)
