"""The ten objects of the generated world, seen from above. Each has a colour and a shape of its own."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.sprites import WHITE, Colour, Painter, Point, Sprite, shade


@dataclass(frozen=True, slots=True)
class Lid:
    """Moving part of an object: its outer and inner face and how it moves.

    A hinged lid turns about the line x = hinge (axis "x") or y = hinge (axis "y"); axis "off" is a lid that
    is put beside the object.
    """

    outer: Sprite
    inner: Sprite
    axis: str
    hinge: float
    grip: Point


@dataclass(frozen=True, slots=True)
class ObjectSprites:
    """What is needed to draw one object: the body, perhaps a lid, and where the hand takes it."""

    body: Sprite
    lid: Lid | None
    grip: Point


def _cup(px: float, tint: Callable[[Colour], Colour]) -> ObjectSprites:
    red = tint((205, 38, 34))
    painter = Painter(1.6, 1.6, px)
    painter.ring((0.92, 0), (0.34, 0.34), 0.2, shade(red, 0.8))
    painter.disc((0, 0), 0.82, red)
    painter.disc((0, 0), 0.62, shade(red, 1.25), 0.03)
    painter.disc((0, 0), 0.54, (74, 44, 24), 0.03)
    return ObjectSprites(painter.finish(0.45), None, (0.0, 0.6))


def _bottle(px: float, tint: Callable[[Colour], Colour]) -> ObjectSprites:
    green = tint((36, 150, 62))
    painter = Painter(1.6, 1.8, px)
    outline = [
        (-0.2, -0.8),
        (0.2, -0.8),
        (0.24, -0.45),
        (0.5, -0.1),
        (0.5, 1.1),
        (-0.5, 1.1),
        (-0.5, -0.1),
        (-0.24, -0.45),
    ]
    painter.polygon(outline, green, 0.06)
    painter.box(-0.27, -1.15, 0.27, -0.75, WHITE)
    painter.box(-0.48, 0.2, 0.48, 0.8, (236, 226, 150), 0.03)
    painter.stroke([(-0.3, -0.02), (-0.3, 0.15)], 0.1, shade(green, 1.5))
    return ObjectSprites(painter.finish(0.45), None, (0.0, 0.75))


def _pan(px: float, tint: Callable[[Colour], Colour]) -> ObjectSprites:
    black = tint((42, 42, 46))
    painter = Painter(1.6, 1.9, px)
    painter.box(-0.16, 0.4, 0.16, 1.5, tint((120, 74, 40)))
    painter.disc((0, -0.3), 0.86, black, 0.0)
    painter.ring((0, -0.3), (0.84, 0.84), 0.1, (150, 150, 156))
    painter.disc((0, -0.3), 0.62, shade(black, 1.5), 0.0)
    return ObjectSprites(painter.finish(0.45), None, (0.0, 0.75))


def _spoon(px: float, tint: Callable[[Colour], Colour]) -> ObjectSprites:
    yellow = tint((240, 200, 30))
    painter = Painter(1.6, 1.9, px)
    painter.stroke([(0, -0.3), (0, 1.3)], 0.34, shade(yellow, 0.55))
    painter.stroke([(0, -0.3), (0, 1.3)], 0.24, yellow)
    painter.disc((0, -0.75), (0.46, 0.6), yellow, 0.06)
    painter.disc((0, -0.75), (0.28, 0.4), shade(yellow, 0.8), 0.0)
    return ObjectSprites(painter.finish(0.45), None, (0.0, 0.65))


def _brush(px: float, tint: Callable[[Colour], Colour]) -> ObjectSprites:
    pink = tint((235, 70, 160))
    painter = Painter(1.6, 1.9, px)
    painter.polygon([(-0.2, -0.1), (0.2, -0.1), (0.16, 1.35), (-0.16, 1.35)], pink, 0.06)
    painter.box(-0.72, -0.5, 0.72, -0.05, shade(pink, 0.8))
    painter.box(-0.66, -1.15, 0.66, -0.5, (232, 224, 196))
    for x in (-0.4, -0.13, 0.13, 0.4):
        painter.stroke([(x, -1.1), (x, -0.55)], 0.05, (160, 148, 110))
    return ObjectSprites(painter.finish(0.45), None, (0.0, 0.6))


def _plate(px: float, tint: Callable[[Colour], Colour]) -> ObjectSprites:
    painter = Painter(1.6, 1.6, px)
    painter.disc((0, 0), 1.05, WHITE, 0.05)
    painter.ring((0, 0), (0.86, 0.86), 0.1, tint((30, 150, 190)))
    painter.disc((0, 0), 0.6, (222, 222, 220), 0.03)
    return ObjectSprites(painter.finish(0.45), None, (0.0, 0.75))


def _box(px: float, tint: Callable[[Colour], Colour]) -> ObjectSprites:
    orange = tint((232, 126, 36))
    body, outer, inner = (Painter(1.6, 2.6, px) for _ in range(3))
    body.box(-0.9, -0.75, 0.9, 0.75, shade(orange, 0.8), 0.08)
    body.box(-0.74, -0.6, 0.74, 0.6, (58, 34, 22), 0.0)
    body.disc((-0.25, 0.05), 0.3, (240, 240, 90), 0.04)
    body.disc((0.32, -0.1), 0.26, (240, 240, 240), 0.04)
    outer.box(-0.92, -0.77, 0.92, 0.77, orange, 0.08)
    outer.box(-0.92, -0.14, 0.92, 0.14, shade(orange, 0.65), 0.0)
    inner.box(-0.92, -0.77, 0.92, 0.77, shade(orange, 0.75), 0.08)
    lid = Lid(outer.finish(), inner.finish(), "y", -0.75, (0.0, 0.62))
    return ObjectSprites(body.finish(0.45), lid, (0.0, 0.6))


def _book(px: float, tint: Callable[[Colour], Colour]) -> ObjectSprites:
    blue = tint((36, 70, 190))
    body, outer, inner = (Painter(2.4, 1.6, px) for _ in range(3))
    body.box(-0.66, -0.92, 0.66, 0.92, blue, 0.05)
    body.box(-0.6, -0.84, 0.6, 0.84, (244, 240, 226), 0.02)
    for y in (-0.55, -0.3, -0.05, 0.2, 0.45):
        body.stroke([(-0.42, y), (0.45, y)], 0.05, (120, 120, 120))
    outer.box(-0.68, -0.94, 0.68, 0.94, blue, 0.07)
    outer.box(-0.4, -0.6, 0.45, -0.2, (245, 215, 90), 0.0)
    outer.stroke([(-0.35, 0.5), (0.4, 0.5)], 0.1, (245, 215, 90))
    inner.box(-0.68, -0.94, 0.68, 0.94, blue, 0.07)
    inner.box(-0.58, -0.84, 0.6, 0.84, (226, 222, 208), 0.0)
    lid = Lid(outer.finish(), inner.finish(), "x", -0.66, (0.55, 0.35))
    return ObjectSprites(body.finish(0.45), lid, (0.0, 0.7))


def _laptop(px: float, tint: Callable[[Colour], Colour]) -> ObjectSprites:
    # A grey that took a tint would be some other colour.
    level = sum(tint((172, 172, 172))) // 3
    grey = (level - 4, level, level + 6)
    body, outer, inner = (Painter(1.8, 2.6, px) for _ in range(3))
    body.box(-1.1, -0.72, 1.1, 0.72, grey, 0.06)
    for y in (-0.5, -0.26, -0.02):
        for x in np.linspace(-0.9, 0.72, 7):
            body.box(x, y, x + 0.18, y + 0.17, (38, 38, 42), 0.0)
    body.box(-0.35, 0.26, 0.35, 0.6, shade(grey, 0.8), 0.02)
    outer.box(-1.12, -0.74, 1.12, 0.74, grey, 0.08)
    outer.disc((0, 0), 0.22, shade(grey, 1.35), 0.0)
    inner.box(-1.12, -0.74, 1.12, 0.74, (40, 40, 44), 0.08)
    inner.box(-0.96, -0.6, 0.96, 0.6, (110, 205, 235), 0.0)
    lid = Lid(outer.finish(), inner.finish(), "y", -0.72, (0.0, 0.6))
    return ObjectSprites(body.finish(0.45), lid, (0.0, 0.6))


def _jar(px: float, tint: Callable[[Colour], Colour]) -> ObjectSprites:
    purple = tint((126, 44, 170))
    body, outer = Painter(1.6, 1.6, px), Painter(1.6, 1.6, px)
    body.disc((0, 0), 0.86, (206, 224, 226), 0.06)
    body.disc((0, 0), 0.66, tint((214, 110, 20)), 0.05)
    body.disc((-0.2, -0.2), 0.16, (246, 190, 90), 0.0)
    outer.disc((0, 0), 0.8, purple, 0.07)
    outer.ring((0, 0), (0.52, 0.52), 0.1, shade(purple, 1.45))
    outer.stroke([(-0.3, 0), (0.3, 0)], 0.12, (245, 235, 250))
    cover = outer.finish(0.4)
    return ObjectSprites(body.finish(0.45), Lid(cover, cover, "off", 0.0, (0.0, 0.45)), (0.0, 0.6))


_DRAW = {
    "cup": _cup,
    "bottle": _bottle,
    "pan": _pan,
    "spoon": _spoon,
    "brush": _brush,
    "plate": _plate,
    "box": _box,
    "book": _book,
    "laptop": _laptop,
    "jar": _jar,
}


def draw_object(noun: str, px: float, tint: Callable[[Colour], Colour]) -> ObjectSprites:
    """Draws one object; px is half its size in pixels, tint varies its main colours from video to video."""
    return _DRAW[noun](px, tint)
