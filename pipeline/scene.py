"""Draws the generated world at any instant of a video: resting objects, acting object and hand.

The phase of an action runs from 0 to 1 for a forward verb and from 1 to 0 for its reversal, and what the
action moves is a function of the phase alone; that is what makes two reversed verbs show the same pictures in
opposite order. Only the head moves on regardless: it drifts a little, and between two actions it turns to the
object that comes next, as people look at what they are about to touch.
"""

import math

import cv2
import numpy as np

from pipeline.motion import REACHED, RELEASED, Affine, HandPose, Motion, Pose, similarity, smooth
from pipeline.objects import draw_object
from pipeline.script import NOUNS, TAKE, VideoSpec, bits_before
from pipeline.sprites import Colour, Image, Sprite, draw_hand, draw_table, mirrored, shade

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
        rng = np.random.default_rng(spec.look_seed)
        self.motion = motion = Motion(spec, rng)
        table = draw_table(rng, motion.width + 2 * motion.margin, motion.height + 2 * motion.margin)
        self.light = rng.uniform(0.86, 1.1) * (1 + rng.uniform(-0.05, 0.05, 3))
        self.sprites = [draw_object(NOUNS[item.noun], motion.unit, self._tint(rng)) for item in spec.objects]
        skin = self._lit(SKIN_TONES[rng.integers(len(SKIN_TONES))])
        self.sleeve = self._lit(SLEEVES[rng.integers(len(SLEEVES))])
        right = [draw_hand(motion.unit * 1.12, skin, is_gripping=grip) for grip in (False, True)]
        self.hands = {"right": right, "left": [mirrored(sprite) for sprite in right]}
        # Pictures have four channels throughout: OpenCV warps four bytes three times as fast as three.
        lit = np.clip(table * self.light, 0, 255).astype(np.uint8)
        self.table = np.dstack([lit, np.full(lit.shape[:2], 255, np.uint8)])
        self.bits = bits_before(spec)
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
        before = int(np.searchsorted(self.motion.starts, time_s, side="right")) - 1
        action = self.spec.actions[before] if before >= 0 else None
        if action is not None and time_s > action.end_s:
            action = None
        camera = self.motion.camera(time_s)
        acting = -1 if action is None else action.object_index
        resting = self._resting_table(before + (action is None), acting)
        frame = np.empty((self.motion.view_height, self.motion.view_width, 4), np.uint8)
        size = (self.motion.view_width, self.motion.view_height)
        cv2.warpAffine(resting, camera[:2], size, dst=frame, flags=cv2.INTER_LINEAR)
        if action is not None:
            phase = (time_s - action.start_s) / (action.end_s - action.start_s)
            phase = 1 - phase if action.is_reversed else phase
            self._draw_acting(frame, camera, self.bits[before], acting, action.pair, phase)
        return frame

    def _resting_table(self, step: int, acting: int) -> Image:
        """Returns the table with every object but the acting one; drawn once per state."""
        if self._resting_key != (step, acting):
            self._resting = self.table.copy()
            for index in range(len(self.spec.objects)):
                bits = self.bits[step][index]
                if index != acting and not bits[TAKE]:
                    self._draw_object(self._resting, np.eye(3), index, self.motion.pose(index, bits))
            self._resting_key = (step, acting)
        return self._resting

    def _draw_object(self, image: Image, camera: Affine, index: int, pose: Pose) -> None:
        sprites = self.sprites[index]
        placed = camera @ similarity(pose.x, pose.y, pose.angle, pose.scale, pose.scale)
        paste(image, sprites.body, placed)
        if sprites.lid is not None:
            sprite, local = self.motion.lid_transform(sprites, pose.openness)
            paste(image, sprite, placed @ local)

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
        pose = self.motion.pose(index, progress)
        if pair == TAKE:
            pose = self.motion.carried(index, pose, phase)
        self._draw_object(frame, camera, index, pose)
        hand = self.motion.hand_pose(index, self.sprites[index], pair, phase, pose)
        self._draw_arm(frame, camera, hand)
        sprite = self.hands[self.motion.side(index)][int(hand.is_gripping)]
        paste(frame, sprite, camera @ similarity(hand.x, hand.y, hand.angle, hand.scale, hand.scale))

    def _draw_arm(self, frame: Image, camera: Affine, hand: HandPose) -> None:
        """Draws the sleeve from the wrist to beyond the border of the picture."""
        unit = self.motion.unit * hand.scale
        wrist, elbow = 1.9 * unit, 1.9 * unit + 1.6 * max(self.motion.width, self.motion.height)
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
