"""Shapes as signed distance functions.

Every shape lies in the unit disc. A function takes coordinates ``x`` (right) and ``y`` (down) that broadcast,
in units of the shape's radius, and returns the distance to the outline in the same units: negative inside.
Distances are those to the nearest edge *line*, exact along the edges, which is all that anti-aliasing needs.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.88


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.7


def _triangle(x: Array, y: Array) -> Array:
    # Three edges at distance 0.5 from the centre: an equilateral triangle that stands on its base.
    slope = np.abs(x) * (math.sqrt(3) / 2) - y * 0.5
    return np.maximum(slope, y) - 0.5


def _diamond(x: Array, y: Array) -> Array:
    # |x| / 0.76 + |y| = 1, divided by the length of its gradient.
    return (np.abs(x) / 0.76 + np.abs(y) - 1) / math.hypot(1 / 0.76, 1)


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    long, wide = 0.94, 0.3
    return np.minimum(np.maximum(x - long, y - wide), np.maximum(x - wide, y - long))


RING_HOLE = 0.51  # of the ring's radius: that of its hole


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - (RING_HOLE + 0.23)) - 0.23


def _star(x: Array, y: Array) -> Array:
    # Fold the plane into one tenth of the star, whose edge runs from the tip (0, -1) to the notch at 36
    # degrees.
    tenth, notch = math.pi / 5, 0.5
    angle = np.abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)
    reach = np.hypot(x, y)
    across, along = reach * np.sin(angle), reach * np.cos(angle)
    edge = np.array((notch * math.sin(tenth), notch * math.cos(tenth) - 1))
    return (along - 1) * (edge[0] / np.hypot(*edge)) - across * (edge[1] / np.hypot(*edge))


Outline = Callable[[Array, Array], Array]

SHAPES: dict[str, Outline] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
    "star": _star,
}
