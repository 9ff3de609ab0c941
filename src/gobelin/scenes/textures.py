"""Textures: the share of each pixel that is in the second tone of an object's colour.

A function takes coordinates ``x`` (right) and ``y`` (down) that broadcast, in pixels from the object's centre, and
returns the share of the second tone in [0, 1], anti-aliased. All repeat after ``TEXTURE_PERIOD`` pixels both ways, at
every size of the object.
"""

from collections.abc import Callable

import numpy as np

from gobelin.scenes.shapes import Array

TEXTURE_PERIOD = 5  # pixels
_STRIPE = 2.0  # pixels
_DOT = 1.35  # pixels


def _solid(x: Array, y: Array) -> Array:
    return np.zeros(np.broadcast(x, y).shape)


def _striped(x: Array, y: Array) -> Array:
    return np.broadcast_to(_soft(np.abs(_nearest(y)) - _STRIPE / 2), np.broadcast(x, y).shape)


def _dotted(x: Array, y: Array) -> Array:
    return _soft(np.hypot(_nearest(x), _nearest(y)) - _DOT)


TEXTURES: dict[str, Callable[[Array, Array], Array]] = {"solid": _solid, "striped": _striped, "dotted": _dotted}


def _nearest(at: Array) -> Array:
    """Compute the offset from the nearest multiple of the period, in pixels."""
    return (at + TEXTURE_PERIOD / 2) % TEXTURE_PERIOD - TEXTURE_PERIOD / 2


def _soft(distance: Array) -> Array:
    """Compute the share of a pixel that is inside, from the ``distance`` of its centre to the edge in pixels."""
    return np.clip(0.5 - distance, 0, 1)
