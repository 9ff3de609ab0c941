"""Spatial relations of objects by GenEval's rule, and the match between objects and what a text asks for."""

from collections.abc import Iterable, Sequence
from itertools import product
from math import hypot
from typing import Protocol, runtime_checkable

RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "inside": "around",
    "around": "inside",
}

# An object as a text asks for it: its shape and its colour, or its shape, colour, texture and size; None is any.
Wanted = tuple[str | None, ...]

# GenEval, evaluation/evaluate_images.py: POSITION_THRESHOLD, and the share of the offset that a direction
# needs.
_TOLERANCE = 0.1
_SHARE = 0.5


@runtime_checkable
class Thing(Protocol):
    """An object with looks and a box, of a scene or detected by the grader. Lengths are in pixels."""

    @property
    def shape(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def texture(self) -> str: ...
    @property
    def size(self) -> str | None: ...
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...
    @property
    def width(self) -> float: ...
    @property
    def height(self) -> float: ...


def relations(a: Thing, b: Thing) -> frozenset[str]:
    """Compute the relations of ``a`` to ``b``: none, one, or two on a diagonal.

    As in GenEval, an offset counts beyond a tenth of the sizes' sum, and as a direction when it makes up half
    of the distance. An object whose box lies in another's is inside it, and has no direction.
    """
    if _within(a, b):
        return frozenset({"inside"})
    if _within(b, a):
        return frozenset({"around"})
    dx, dy = a.x - b.x, a.y - b.y
    far = hypot(dx, dy)
    right = (abs(dx) - _TOLERANCE * (a.width + b.width)) > _SHARE * far
    down = (abs(dy) - _TOLERANCE * (a.height + b.height)) > _SHARE * far
    found = ("left of" if dx < 0 else "right of",) * right + ("above" if dy < 0 else "below",) * down
    return frozenset(found)


def _within(a: Thing, b: Thing) -> bool:
    """Return True where the box of ``a`` lies in that of ``b``, and is smaller."""
    return 2 * abs(a.x - b.x) < b.width - a.width and 2 * abs(a.y - b.y) < b.height - a.height


def answers(wanted: Wanted, thing: Thing) -> bool:
    """Return True where an object has the looks that a text asks for."""
    looks = (thing.shape, thing.colour, thing.texture, thing.size)
    return all(asked in (None, found) for asked, found in zip(wanted, looks, strict=False))


def found_in(
    wanted: Sequence[Wanted], relation: str | None, things: Iterable[Thing], *, count: int | None = None
) -> bool:
    """Return True where different objects answer to all ``wanted``, the first standing in ``relation`` to the second.

    With a ``count``, exactly that number may answer to the first of ``wanted``: "three" is not true of four.
    """
    things = list(things)
    answering = [[at for at, thing in enumerate(things) if answers(one, thing)] for one in wanted]
    if count is not None and len(answering[0]) != count:
        return False
    return any(
        len(set(chosen)) == len(chosen)
        and (relation is None or relation in relations(things[chosen[0]], things[chosen[1]]))
        for chosen in product(*answering)
    )
