"""Worlds: the contents of scenes, their frequencies, and the combinations kept from training."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gobelin.errors import UsageError
from gobelin.scenes.colours import BACKGROUNDS, COLOURS
from gobelin.scenes.relations import INVERSE, Wanted
from gobelin.scenes.shapes import RING_HOLE, SHAPES
from gobelin.scenes.textures import TEXTURES

# Each category, and the most objects of its scenes. Scenes of "count" have like objects, in the numbers of COUNTS,
# and those of "inside" an object inside a ring.
CATEGORIES = {"single": 1, "two": 2, "relation": 2, "count": 4, "inside": 2}
COUNTS = (2, 3, 4)
SPLITS = ("train", "dev", "test", "heldout")
EDGE_MARGIN = 1.0  # pixels between an object's disc and the edge of the image


@dataclass(frozen=True, kw_only=True)
class World:
    """A distribution of captioned scenes.

    ``radius`` bounds the radius of an object that is alone, ``radius_crowded`` that of one in company and
    ``radius_count`` that of one in a "count", in pixels; where there are ``sizes``, the words and the bounds that
    they mean, these bound them all. ``radius_ring`` and ``radius_inside`` are those of a ring and of what is
    inside it. ``noise`` is the standard deviation of the pixels' noise, where white is 1, and ``gradient`` the
    greatest brightening of a background towards the edges, in levels of [0, 255].

    ``mix`` weighs the categories. ``underspecified`` is the fraction of captions that leave something out, and
    ``colourless`` the fraction of those that name no colour at all; the rest leave out one colour or shape.
    ``grounded`` is the fraction of captions that name the background, and ``placed`` the fraction of those of a
    "single" or of "two" that say where in the picture an object is. ``gap`` is the least distance between
    objects and ``size`` the side of the image, in pixels. Raises UsageError for names that do not exist, for too
    few of them, and for objects too large for the image.
    """

    name: str
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    radius: tuple[float, float]
    radius_crowded: tuple[float, float]
    mix: tuple[tuple[str, float], ...]
    radius_count: tuple[float, float] = (7.0, 10.0)
    underspecified: float = 0.15
    colourless: float = 0.0
    textures: tuple[str, ...] = ("solid",)
    sizes: tuple[tuple[str, tuple[float, float]], ...] = ()
    radius_ring: tuple[float, float] = (24.0, 28.0)
    radius_inside: tuple[float, float] = (8.0, 9.0)
    grounded: float = 0.0
    placed: float = 0.0
    gradient: float = 0.0
    noise: float = 0.004
    gap: float = 3.0
    size: int = 64

    def __post_init__(self) -> None:
        for kind, given, known in (
            ("shapes", self.shapes, SHAPES),
            ("colours", self.colours, COLOURS),
            ("backgrounds", self.backgrounds, BACKGROUNDS),
            ("textures", self.textures, TEXTURES),
            ("categories", self.categories, CATEGORIES),
        ):
            if not given or not set(given) <= set(known):
                raise UsageError(f"Expected {kind} of {', '.join(known)}; got {', '.join(given) or 'none'}.")
        if not self.held_out_pairs:
            pairs = len(self.shapes) * len(self.colours)
            raise UsageError(f"Expected 7 pairs of shape and colour or more, so as to hold some out; got {pairs}.")
        room = self.size - 2 * EDGE_MARGIN
        crowded = max(self.radius_crowded[1], self.radius_count[1], *(bounds[1] for _, bounds in self.sizes))
        if 2 * self.radius[1] > room or 4 * crowded + self.gap > room:
            raise UsageError(
                f"Expected one disc, or two with a gap, to fit into {room:g} px; "
                f"got radii of {self.radius[1]:g} and {crowded:g} px."
            )

        if "inside" in self.categories:
            self._check_rings(room)

    def _check_rings(self, room: float) -> None:
        """Check that an object can be inside a ring; raises UsageError where none fits."""
        if "ring" not in self.shapes or len(self.shapes) < 2:
            raise UsageError(f"Expected rings, and other shapes to be inside them; got {', '.join(self.shapes)}.")
        hole = RING_HOLE * self.radius_ring[0] - self.gap
        if 2 * self.radius_ring[1] > room or self.radius_inside[1] > hole:
            raise UsageError(
                f"Expected rings that fit into {room:g} px, and radii of {hole:g} px or less inside them; "
                f"got {self.radius_ring[1]:g} and {self.radius_inside[1]:g} px."
            )

    def size_of(self, radius: float) -> str | None:
        """Name an object's size: the word whose bounds are nearest to its radius, None in a world without words."""
        if not self.sizes:
            return None
        return min(self.sizes, key=lambda size: max(size[1][0] - radius, radius - size[1][1]))[0]

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories of the mix."""
        return tuple(category for category, _ in self.mix)

    @property
    def max_objects(self) -> int:
        """The most objects that a scene has."""
        return max(CATEGORIES[category] for category in self.categories)

    @cached_property
    def held_out_pairs(self) -> frozenset[tuple[str, str]]:
        """The (shape, colour) pairs kept from training, 15 % of all.

        Shapes and colours are both dealt out in turn, so that each loses as few pairs as can be.
        """
        shapes, colours = self.shapes, self.colours
        count = int(0.15 * len(shapes) * len(colours))
        return frozenset((shapes[k % len(shapes)], colours[(k + 1) % len(colours)]) for k in range(count))

    @cached_property
    def held_out_relations(self) -> frozenset[tuple[str, str, str]]:
        """The (shape, relation, shape) triples kept from training, closed under turning a relation round.

        Each shape is kept from being left of, or above, the next shape in the list, by turns; and where there is
        "inside", the shape after the ring from being inside a ring.
        """
        following = (*self.shapes[1:], self.shapes[0])
        kept = {
            (a, ("left of", "above")[k % 2], b) for k, (a, b) in enumerate(zip(self.shapes, following, strict=True))
        }
        if "inside" in self.categories:
            kept.add((following[self.shapes.index("ring")], "inside", "ring"))
        return frozenset(kept | {(b, INVERSE[relation], a) for a, relation, b in kept})

    @cached_property
    def held_out_counts(self) -> frozenset[tuple[int, str]]:
        """The (number, shape) pairs kept from training, 15 % of all, dealt out like ``held_out_pairs``.

        None where the mix has no "count".
        """
        if "count" not in self.categories:
            return frozenset()
        kept = int(0.15 * len(COUNTS) * len(self.shapes))
        return frozenset((COUNTS[k % len(COUNTS)], self.shapes[(k + 1) % len(self.shapes)]) for k in range(kept))

    def holds_out(self, objects: Sequence[Wanted], *relations: str) -> bool:
        """Return True for a combination that training never shows.

        That is one where an object's pair is held out, or one of the ``relations`` of the first to the second, or
        the number of objects of a shape; or where there are more objects than in any scene.
        """
        numbers = Counter(wanted[0] for wanted in objects if wanted[0])
        return (
            any(wanted[:2] in self.held_out_pairs for wanted in objects)
            or any((objects[0][0], relation, objects[1][0]) in self.held_out_relations for relation in relations)
            or any((number, shape) in self.held_out_counts for shape, number in numbers.items())
            or len(objects) > self.max_objects
        )


CORE = World(
    name="core",
    shapes=("circle", "square", "triangle", "diamond", "cross", "ring", "star"),
    colours=("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"),
    backgrounds=("grey", "sage", "sand"),
    radius=(8.0, 14.0),
    radius_crowded=(8.0, 13.0),
    mix=(("single", 0.2), ("two", 0.3), ("relation", 0.2), ("count", 0.3)),
    underspecified=0.35,
    colourless=0.7,
    placed=0.5,
)

NANO = World(
    name="nano",
    shapes=("circle", "square", "triangle", "cross", "ring"),
    colours=("red", "green", "blue", "yellow", "purple", "black"),
    backgrounds=("paper",),
    radius=(11.0, 15.0),
    radius_crowded=(9.5, 13.0),
    mix=(("single", 0.5), ("two", 0.25), ("relation", 0.25)),
)

RICH = World(
    name="rich",
    shapes=CORE.shapes,
    colours=CORE.colours,
    backgrounds=("grey", "sage", "sand", "lilac", "rose", "slate"),
    radius=(8.0, 13.0),
    radius_crowded=(8.0, 13.0),
    radius_count=(8.0, 13.0),
    mix=(("single", 0.2), ("two", 0.2), ("relation", 0.2), ("count", 0.2), ("inside", 0.2)),
    underspecified=0.2,
    colourless=0.5,
    textures=("solid", "striped", "dotted"),
    sizes=(("small", (8.0, 9.0)), ("large", (11.5, 13.0))),
    grounded=0.5,
    gradient=8.0,
    noise=0.01,
)

WORLDS = {world.name: world for world in (CORE, NANO, RICH)}
