"""Pictures of the generated world: shapes, hands and table textures. The objects are in `pipeline.objects`.

A sprite is drawn once per video, four times too large, and reduced, which gives smooth edges. Local
coordinates are in half object sizes, x to the right and y down, with (0, 0) at the object's centre or, for
hands, between the fingertips.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
Point = tuple[float, float]
Image = NDArray[np.uint8]

SUPERSAMPLE = 4
WHITE: Colour = (240, 240, 236)


@dataclass(frozen=True, slots=True)
class Sprite:
    """Premultiplied RGBA picture and the pixel in it that is the local origin."""

    rgba: Image
    origin_x: float
    origin_y: float


def shade(colour: Colour, factor: float) -> Colour:
    """Makes a colour darker (factor < 1) or lighter."""
    red, green, blue = (max(0, min(255, int(channel * factor))) for channel in colour)
    return red, green, blue


class Painter:
    """Draws shapes in local coordinates into a supersampled RGBA picture.

    half_width and half_height are the reach of the picture in local units; px is the number of output pixels
    per local unit.
    """

    def __init__(self, half_width: float, half_height: float, px: float) -> None:
        self.scale = px * SUPERSAMPLE
        self.centre = (half_width * self.scale, half_height * self.scale)
        size = [int(np.ceil(2 * half * px)) * SUPERSAMPLE for half in (half_height, half_width)]
        self.rgba_HWC = np.zeros((size[0], size[1], 4), np.uint8)

    def _pixels(self, points: Sequence[Point]) -> NDArray[np.int32]:
        return np.round(np.array(points) * self.scale + self.centre).astype(np.int32)

    def polygon(self, points: Sequence[Point], colour: Colour, outline: float = 0.05) -> None:
        """Fills a polygon and gives it a darker edge."""
        pixels = self._pixels(points)
        cv2.fillPoly(self.rgba_HWC, [pixels], (*colour, 255))
        if outline:
            width = max(1, round(outline * self.scale))
            cv2.polylines(self.rgba_HWC, [pixels], True, (*shade(colour, 0.55), 255), width)

    def box(
        self, left: float, top: float, right: float, bottom: float, colour: Colour, outline: float = 0.05
    ) -> None:
        """Fills an upright rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour, outline)

    def disc(self, centre: Point, radius: float | Point, colour: Colour, outline: float = 0.05) -> None:
        """Fills a circle or an upright ellipse."""
        x, y = (int(value) for value in self._pixels([centre])[0])
        radii = radius if isinstance(radius, tuple) else (radius, radius)
        axes = (round(radii[0] * self.scale), round(radii[1] * self.scale))
        cv2.ellipse(self.rgba_HWC, (x, y), axes, 0, 0, 360, (*colour, 255), -1)
        if outline:
            width = max(1, round(outline * self.scale))
            cv2.ellipse(self.rgba_HWC, (x, y), axes, 0, 0, 360, (*shade(colour, 0.55), 255), width)

    def ring(self, centre: Point, radius: Point, width: float, colour: Colour) -> None:
        """Draws an ellipse of a given line width, for handles and rims."""
        x, y = (int(value) for value in self._pixels([centre])[0])
        axes = (round(radius[0] * self.scale), round(radius[1] * self.scale))
        cv2.ellipse(self.rgba_HWC, (x, y), axes, 0, 0, 360, (*colour, 255), max(1, round(width * self.scale)))

    def stroke(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Draws a line with round ends."""
        pixels = self._pixels(points)
        cv2.polylines(self.rgba_HWC, [pixels], False, (*colour, 255), max(1, round(width * self.scale)))

    def finish(self, shadow: float = 0.0) -> Sprite:
        """Reduces to output size, adds a soft shadow of the given strength, and trims empty borders."""
        height, width = (side // SUPERSAMPLE for side in self.rgba_HWC.shape[:2])
        reduced = cv2.resize(self.rgba_HWC, (width, height), interpolation=cv2.INTER_AREA)
        rgba = np.asarray(reduced, np.uint8)
        offset = self.centre[0] / SUPERSAMPLE, self.centre[1] / SUPERSAMPLE
        if shadow:
            shift = max(2, round(0.12 * self.scale / SUPERSAMPLE))
            alpha = rgba[..., 3].astype(np.float32) / 255
            moved = np.zeros_like(alpha)
            moved[shift:, shift // 2 :] = alpha[:-shift, : alpha.shape[1] - shift // 2]
            soft = cv2.GaussianBlur(moved, (0, 0), shift * 0.6) * shadow
            rgba[..., 3] = np.round(255 * (alpha + (1 - alpha) * soft)).astype(np.uint8)
        rows, columns = np.flatnonzero(rgba[..., 3].any(1)), np.flatnonzero(rgba[..., 3].any(0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        trimmed = np.ascontiguousarray(rgba[top:bottom, left:right])
        return Sprite(trimmed, offset[0] - left, offset[1] - top)


def draw_hand(px: float, skin: Colour, *, is_gripping: bool) -> Sprite:
    """Draws a right hand from above, fingers up, fingertips around the local origin, wrist at (0, 1.75)."""
    painter = Painter(1.6, 2.2, px)
    dark = shade(skin, 0.72)
    spread, length = (0.03, 0.42) if is_gripping else (0.12, 0.0)
    roots = [(-0.4, 0.72), (-0.14, 0.64), (0.13, 0.66), (0.38, 0.76)]
    tips = [
        (-0.42 - 3 * spread, 0.06),
        (-0.15 - spread, -0.08),
        (0.14 + spread, -0.06),
        (0.4 + 3 * spread, 0.1),
    ]
    thumb = (
        [(-0.42, 1.25), (-0.72, 0.72), (-0.3, 0.3)]
        if is_gripping
        else [(-0.42, 1.25), (-0.95, 0.85), (-1.05, 0.5)]
    )
    painter.stroke([(0, 1.2), (0, 1.95)], 0.72, dark)
    painter.stroke([(0, 1.2), (0, 1.95)], 0.64, skin)
    painter.stroke(thumb, 0.36, dark)
    painter.stroke(thumb, 0.27, skin)
    for (root_x, root_y), (tip_x, tip_y) in zip(roots, tips, strict=True):
        painter.stroke([(root_x, root_y), (tip_x, tip_y + length * 0.5)], 0.33, dark)
    painter.disc((0, 1.05), (0.62, 0.6), skin, 0.05)
    for (root_x, root_y), (tip_x, tip_y) in zip(roots, tips, strict=True):
        painter.stroke([(root_x, root_y), (tip_x, tip_y + length * 0.5)], 0.25, skin)
    return painter.finish(0.35)


def mirrored(sprite: Sprite) -> Sprite:
    """Turns a right hand into a left hand."""
    width = sprite.rgba.shape[1]
    return Sprite(np.ascontiguousarray(sprite.rgba[:, ::-1]), width - sprite.origin_x, sprite.origin_y)


TABLE_COLOURS: tuple[Colour, ...] = (
    (150, 104, 66),
    (188, 150, 108),
    (108, 76, 54),
    (134, 136, 140),
    (206, 198, 184),
    (92, 104, 100),
    (168, 124, 92),
    (120, 128, 148),
)


def draw_table(rng: np.random.Generator, width: int, height: int) -> Image:
    """Draws a table top: plain colour with grain, planks or a weave, and uneven light."""
    colour = np.array(TABLE_COLOURS[rng.integers(len(TABLE_COLOURS))], np.float32) * rng.uniform(0.85, 1.12)
    stretch = float(rng.choice([3.0, 12.0, 30.0]))
    fine = rng.standard_normal((height, width)).astype(np.float32)
    grain = cv2.GaussianBlur(fine, (0, 0), sigmaX=stretch, sigmaY=1.2)
    grain /= grain.std() + 1e-6
    coarse = cv2.resize(
        rng.standard_normal((5, 6)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    texture = 1 + 0.055 * grain + 0.05 * coarse
    pattern = rng.integers(3)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    period = height / rng.uniform(3.0, 5.0)
    if pattern == 0:
        texture *= 1 - 0.3 * (np.mod(ys, period) < max(1.5, height * 0.008))
    elif pattern == 1:
        texture *= 1 + 0.05 * np.sign(np.sin(xs * 2 * np.pi / period) * np.sin(ys * 2 * np.pi / period))
    angle = rng.uniform(0, 2 * np.pi)
    light = (
        1
        + rng.uniform(0.05, 0.2)
        * (np.cos(angle) * (xs / width - 0.5) + np.sin(angle) * (ys / height - 0.5))
        * 2
    )
    picture = colour * (texture * light)[..., None]
    return np.clip(picture, 0, 255).astype(np.uint8)
