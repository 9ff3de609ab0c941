"""Blobs: random outlines that the grader must not call a shape.

Each kind is a function that draws one at random, as a signed distance function like those of ``SHAPES``.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gobelin.scenes.colours import BACKGROUNDS, COLOURS
from gobelin.scenes.render import draw_shape
from gobelin.scenes.shapes import SHAPES, Array, Outline
from gobelin.scenes.world import EDGE_MARGIN, World


def _curve(rng: np.random.Generator, world: World) -> Outline:
    """Draw a smooth closed curve: a circle whose radius waves two to five times around, by a fifth to two fifths."""
    waves = np.arange(2, 6)
    heights = rng.normal(size=4) / waves
    heights *= rng.uniform(0.2, 0.4) / np.abs(heights).sum()
    phases = rng.uniform(0, 2 * math.pi, 4)

    def outline(x: Array, y: Array) -> Array:
        angle = np.arctan2(y, x)[..., None]
        radius = 1 + (heights * np.cos(waves * angle + phases)).sum(axis=-1)
        return np.hypot(x, y) - radius / (1 + np.abs(heights).sum())

    return outline


def _half(rng: np.random.Generator, world: World) -> Outline:
    """Draw a shape cut off along a line near its middle."""
    (shape,) = _shapes(rng, world, 1)
    right, down = _direction(rng)
    off = rng.uniform(-0.15, 0.15)
    return lambda x, y: np.maximum(shape(x, y), x * right + y * down - off)


def _bite(rng: np.random.Generator, world: World) -> Outline:
    """Draw a shape with a round piece missing from its side."""
    (shape,) = _shapes(rng, world, 1)
    right, down = _direction(rng)
    radius = rng.uniform(0.4, 0.6)
    return lambda x, y: np.maximum(shape(x, y), radius - np.hypot(x - 0.75 * right, y - 0.75 * down))


def _union(rng: np.random.Generator, world: World) -> Outline:
    """Draw the union of two different shapes that overlap."""
    one, other = _shapes(rng, world, 2)
    right, down = _direction(rng)
    small, off = 0.62, 0.38
    return lambda x, y: (
        small
        * np.minimum(
            one((x - off * right) / small, (y - off * down) / small),
            other((x + off * right) / small, (y + off * down) / small),
        )
    )


def _between(rng: np.random.Generator, world: World) -> Outline:
    """Draw the outline half way between two shapes."""
    one, other = _shapes(rng, world, 2)
    return lambda x, y: (one(x, y) + other(x, y)) / 2


BLOBS: dict[str, Callable[[np.random.Generator, World], Outline]] = {
    "curve": _curve,
    "half": _half,
    "bite": _bite,
    "union": _union,
    "between": _between,
}


def blob(rng: np.random.Generator, world: World, kind: str) -> NDArray[np.uint8]:
    """Draw an image of one blob, uint8 [size, size, 3], with the world's colours; ``kind`` is a key of ``BLOBS``."""
    radius = rng.uniform(*world.radius)
    x, y = rng.uniform(radius + EDGE_MARGIN, world.size - radius - EDGE_MARGIN, 2)
    image = np.empty((world.size, world.size, 3), np.float32)
    image[:] = BACKGROUNDS[world.backgrounds[rng.integers(len(world.backgrounds))]]
    paint = np.array(COLOURS[world.colours[rng.integers(len(world.colours))]], np.float32)
    mask = np.zeros(image.shape[:2], np.bool_)
    draw_shape(image, mask, BLOBS[kind](rng, world), paint, x=x, y=y, radius=radius)
    image += 255 * world.noise * rng.standard_normal(image.shape, np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _shapes(rng: np.random.Generator, world: World, count: int) -> list[Outline]:
    """Draw ``count`` different shapes of the world."""
    return [SHAPES[name] for name in rng.choice(world.shapes, count, replace=False)]


def _direction(rng: np.random.Generator) -> tuple[float, float]:
    """Draw a unit vector (right, down)."""
    angle = rng.uniform(0, 2 * math.pi)
    return math.cos(angle), math.sin(angle)
