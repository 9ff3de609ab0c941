"""Where one object is, seen from another: GenEval's rule, for the sampler, the negatives and the judge."""

from collections.abc import Iterable, Sequence
from itertools import product
from math import hypot
from typing import Protocol, runtime_checkable

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(INVERSE)

# An object as a text asks for it: its shape and its colour; None is "any".
Wanted = tuple[str | None, str | None]

# GenEval, evaluation/evaluate_images.py: POSITION_THRESHOLD, and the share of the offset that a direction
# needs.
_TOLERANCE = 0.1
_SHARE = 0.5


@runtime_checkable
class Thing(Protocol):
    """Anything with a name and a box: an object of a scene, or one that the grader saw. Lengths in pixels."""

    @property
    def shape(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...
    @property
    def width(self) -> float: ...
    @property
    def height(self) -> float: ...


def relations(a: Thing, b: Thing) -> frozenset[str]:
    """The relations of ``a`` to ``b``: none, one, or two on a diagonal.

    As in GenEval, an offset counts beyond a tenth of the sizes' sum, and as a direction when it makes up half
    of the distance.
    """
    dx, dy = a.x - b.x, a.y - b.y
    far = hypot(dx, dy)
    right = (abs(dx) - _TOLERANCE * (a.width + b.width)) > _SHARE * far
    down = (abs(dy) - _TOLERANCE * (a.height + b.height)) > _SHARE * far
    found = ("left of" if dx < 0 else "right of",) * right + ("above" if dy < 0 else "below",) * down
    return frozenset(found)


def found_in(
    wanted: Sequence[Wanted], relation: str | None, things: Iterable[Thing], *, count: int | None = None
) -> bool:
    """Whether different things answer to all ``wanted``, the first standing in ``relation`` to the second.

    With a ``count``, just so many things may answer to the first of ``wanted``: "three" is not true of four.
    """
    things = list(things)
    answers = [
        [at for at, thing in enumerate(things) if shape in (None, thing.shape) and colour in (None, thing.colour)]
        for shape, colour in wanted
    ]
    if count is not None and len(answers[0]) != count:
        return False
    return any(
        len(set(chosen)) == len(chosen)
        and (relation is None or relation in relations(things[chosen[0]], things[chosen[1]]))
        for chosen in product(*answers)
    )
