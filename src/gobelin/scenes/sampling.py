"""The sampler: (seed, index) → image, caption, scene and masks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from gobelin.errors import UsageError
from gobelin.scenes.captions import PLACES, Mention, Phrasing, phrase, templates
from gobelin.scenes.relations import Wanted, relations
from gobelin.scenes.render import render
from gobelin.scenes.scene import Scene, SceneObject
from gobelin.scenes.shapes import RING_HOLE
from gobelin.scenes.world import CORE, COUNTS, MARGIN, SPLITS, World

# A scene about a relation is never on the diagonal: the offset along one axis is this many times the other's.
_CLEAR = 1.7
# The fractions of captions that say what nobody asked: that an object is solid, and of which size it is.
_SOLID_SAID = 0.25
_SIZE_SAID = 0.5
_ASIDE = 0.11  # of the image's side, from its middle: what is on the left, and not in the middle

_Disc = tuple[float, float, float]  # x, y and radius


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One captioned image.

    ``image`` is uint8 [size, size, 3] in [0, 255]; ``masks`` is bool [n, size, size], the visible pixels of
    each of ``scene.objects``; ``words`` gives each word of the caption, without punctuation, and the indices
    of the objects that it speaks of: one for a noun or a colour, both for a relation, all for a number and
    what it counts, none for the rest. ``phrasing`` is the caption before it was words, and ``category`` the
    kind of scene: "single", "two", "relation", "count" or "inside".
    """

    image: NDArray[np.uint8]
    caption: str
    words: tuple[tuple[str, tuple[int, ...]], ...]
    scene: Scene
    masks: NDArray[np.bool_]
    phrasing: Phrasing
    category: str
    world: World
    split: str


def sample(seed: int, index: int, world: World = CORE, split: str = "train") -> Sample:
    """Draw one sample: a pure function of its arguments, for ``seed`` and ``index`` ≥ 0.

    Scenes of "train", "dev" and "test" have no combination that ``world`` holds out, and those of "heldout"
    have at least one. "test" and "heldout" also use templates that "train" and "dev" do not. Raises
    UsageError for another split.
    """
    if split not in SPLITS:
        raise UsageError(f"Expected a split of {', '.join(SPLITS)}; got {split}.")
    rng = np.random.default_rng((seed, index, crc32(f"{world.name}/{split}".encode())))
    category = _category(rng, world)
    scene = _scene(rng, category, world)
    while _held_out(scene, world) != (split == "heldout"):
        scene = _scene(rng, category, world)
    choices = templates(category, split)
    wanted = _wanted(rng, scene, world)
    count = len(wanted) if category == "count" else None
    phrasing = phrase(
        rng,
        wanted[:1] if count else wanted,
        scene.relation,
        choices[rng.integers(len(choices))],
        count=count,
        background=scene.background if world.grounded and rng.random() < world.grounded else None,
        underspecified=world.underspecified,
        colourless=world.colourless,
    )
    if category == "two":
        phrasing = replace(phrasing, mentions=_as_read(phrasing.mentions, scene))
    if world.placed and category in ("single", "two") and rng.random() < world.placed:
        phrasing = replace(phrasing, mentions=tuple(_placed(rng, mention, scene) for mention in phrasing.mentions))
    image, masks = render(scene, noise=world.noise, rng=rng)
    return Sample(
        image=image,
        caption=phrasing.text,
        words=tuple((word.rstrip(","), things) for word, things in phrasing.words()),
        scene=scene,
        masks=masks,
        phrasing=phrasing,
        category=category,
        world=world,
        split=split,
    )


def _category(rng: np.random.Generator, world: World) -> str:
    """Draw a category by its weight in the mix."""
    at = rng.random() * sum(weight for _, weight in world.mix)
    for category, weight in world.mix:
        at -= weight
        if at < 0:
            return category
    return world.mix[-1][0]


def _held_out(scene: Scene, world: World) -> bool:
    """Whether the scene shows a held-out combination, captioned or not."""
    things = scene.objects
    shown = relations(*things) if len(things) == 2 else ()
    return world.holds_out([(thing.shape, thing.colour) for thing in things], *shown)


def _scene(rng: np.random.Generator, category: str, world: World) -> Scene:
    """Draw a scene of a category, held out or not."""
    background = world.backgrounds[rng.integers(len(world.backgrounds))]
    match category:
        case "single":
            names = [_name(rng, world)]
            places = [_place(rng, world, _bounds(rng, world, world.radius))]
        case "count":
            count = COUNTS[rng.integers(len(COUNTS))]
            names = [_name(rng, world)] * count
            places = _places(rng, world, [_bounds(rng, world, world.radius_count, count)] * count)
        case "inside":
            names = [_name(rng, world), ("ring", _name(rng, world)[1])]
            while names[0][0] == "ring":
                names[0] = _name(rng, world)
            places = _nested(rng, world)
        case _:
            names = [_name(rng, world), _name(rng, world)]
            while names[0] == names[1]:
                names[1] = _name(rng, world)
            bounds = [_bounds(rng, world, world.radius_crowded) for _ in names]
            places = _places(rng, world, bounds, clear=category == "relation")
    textures = [_texture(rng, world)] * len(names) if category == "count" else [_texture(rng, world) for _ in names]
    things = tuple(
        SceneObject(shape=shape, colour=colour, x=x, y=y, radius=radius, texture=texture, size=world.size_of(radius))
        for (shape, colour), (x, y, radius), texture in zip(names, places, textures, strict=True)
    )
    relation = next(iter(relations(*things))) if category in ("relation", "inside") else None
    return Scene(
        objects=things, background=background, relation=relation, size=world.size, gradient=_gradient(rng, world)
    )


def _wanted(rng: np.random.Generator, scene: Scene, world: World) -> list[Wanted]:
    """What the caption says of each object: its shape, its colour, a texture that is there, now and then the rest."""
    wanted: list[Wanted] = []
    for thing in scene.objects:
        texture = thing.texture != "solid" or (len(world.textures) > 1 and rng.random() < _SOLID_SAID)
        size = thing.size and rng.random() < _SIZE_SAID
        wanted.append((thing.shape, thing.colour, thing.texture if texture else None, thing.size if size else None))
    return wanted


def _as_read(mentions: Sequence[Mention], scene: Scene) -> tuple[Mention, ...]:
    """The mentions as one reads: along the axis on which two objects are further apart, left or upper one first."""

    def towards_bottom_right(mention: Mention) -> float:
        thing = scene.objects[mention.things[0]]
        return thing.x + thing.y

    return tuple(sorted(mentions, key=towards_bottom_right))


def _placed(rng: np.random.Generator, mention: Mention, scene: Scene) -> Mention:
    """The mention with words for where in the picture its object is, if that is well to one side."""
    thing = scene.objects[mention.things[0]]
    dx, dy = thing.x - scene.size / 2, thing.y - scene.size / 2
    if max(abs(dx), abs(dy)) < _ASIDE * scene.size:
        return mention
    horizontal, vertical = ("left" if dx < 0 else "right"), ("top" if dy < 0 else "bottom")
    wordings = PLACES[horizontal if abs(dx) > abs(dy) else vertical]
    return replace(mention, place=wordings[rng.integers(len(wordings))])


def _bounds(
    rng: np.random.Generator, world: World, otherwise: tuple[float, float], count: int = 1
) -> tuple[float, float]:
    """The bounds of a radius: those of a size drawn at random, where there are sizes. Of the most, all are small."""
    sizes = [bounds for _, bounds in world.sizes]
    if not sizes:
        return otherwise
    return sizes[0 if count == COUNTS[-1] else rng.integers(len(sizes))]


def _texture(rng: np.random.Generator, world: World) -> str:
    """Draw a texture, where there are several."""
    return world.textures[0] if len(world.textures) == 1 else world.textures[rng.integers(len(world.textures))]


def _gradient(rng: np.random.Generator, world: World) -> tuple[float, float]:
    """Draw how the background gets brighter, in levels; all directions alike, and the corners by the most at most."""
    if not world.gradient:
        return 0.0, 0.0
    strength, angle = rng.random(2).tolist()
    strength, angle = strength * world.gradient / math.sqrt(2), angle * 2 * math.pi
    return round(strength * math.cos(angle), 2), round(strength * math.sin(angle), 2)


def _nested(rng: np.random.Generator, world: World) -> list[_Disc]:
    """Draw a disc and a ring around it, with a gap between them."""
    x, y, ring = _place(rng, world, world.radius_ring)
    large, far, angle = rng.random(3).tolist()
    radius = round(world.radius_inside[0] + large * (world.radius_inside[1] - world.radius_inside[0]), 2)
    off, angle = far * (RING_HOLE * ring - radius - world.gap), angle * 2 * math.pi
    return [(round(x + off * math.cos(angle), 2), round(y + off * math.sin(angle), 2), radius), (x, y, ring)]


def _name(rng: np.random.Generator, world: World) -> tuple[str, str]:
    """Draw a shape and a colour."""
    shape, colour = divmod(int(rng.integers(len(world.shapes) * len(world.colours))), len(world.colours))
    return world.shapes[shape], world.colours[colour]


def _place(rng: np.random.Generator, world: World, bounds: tuple[float, float]) -> _Disc:
    """Draw x, y and radius in pixels, with the whole disc inside the image."""
    across, down, large = rng.random(3).tolist()
    radius = round(bounds[0] + large * (bounds[1] - bounds[0]), 2)
    edge = radius + MARGIN
    x, y = (round(edge + at * (world.size - 2 * edge), 2) for at in (across, down))
    return x, y, radius


def _places(
    rng: np.random.Generator, world: World, bounds: Sequence[tuple[float, float]], *, clear: bool = False
) -> list[_Disc]:
    """Draw a disc for each of the ``bounds``, with gaps; ``clear`` ones stand beside or above each other."""
    while True:
        places = [_place(rng, world, one) for one in bounds]
        if all(_apart(one, other, world.gap, clear=clear) for one, other in combinations(places, 2)):
            return places


def _apart(one: _Disc, other: _Disc, gap: float, *, clear: bool) -> bool:
    """Whether two discs leave a gap and, where it must be ``clear``, are not on a diagonal."""
    (x, y, r), (u, v, s) = one, other
    dx, dy = abs(x - u), abs(y - v)
    apart = (dx * dx + dy * dy) ** 0.5 >= r + s + gap
    return apart and (not clear or max(dx, dy) > _CLEAR * min(dx, dy))
