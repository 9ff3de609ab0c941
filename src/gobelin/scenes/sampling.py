"""Scene sampling: draw an image with its caption, scene and masks from (seed, index)."""

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
from gobelin.scenes.world import CORE, COUNTS, EDGE_MARGIN, SPLITS, World

# A scene about a relation is never on the diagonal: the offset along one axis is this many times the other's.
_CLEAR = 1.7
# The fractions of captions that say that an object is solid, and that say its size.
_SOLID_RATE = 0.25
_SIZE_RATE = 0.5
_ASIDE = 0.11  # of the image's side: an object is at one side when it is this far or farther from the middle

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
    category = _draw_category(rng, world)
    scene = _draw_scene(rng, category, world)
    while _is_held_out(scene, world) != (split == "heldout"):
        scene = _draw_scene(rng, category, world)
    choices = templates(category, split)
    wanted = _caption_content(rng, scene, world)
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
        phrasing = replace(phrasing, mentions=_in_reading_order(phrasing.mentions, scene))
    if world.placed and category in ("single", "two") and rng.random() < world.placed:
        phrasing = replace(phrasing, mentions=tuple(_with_place(rng, mention, scene) for mention in phrasing.mentions))
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


def _draw_category(rng: np.random.Generator, world: World) -> str:
    """Draw a category by its weight in the mix."""
    at = rng.random() * sum(weight for _, weight in world.mix)
    for category, weight in world.mix:
        at -= weight
        if at < 0:
            return category
    return world.mix[-1][0]


def _is_held_out(scene: Scene, world: World) -> bool:
    """Return True where the scene shows a held-out combination, captioned or not."""
    things = scene.objects
    shown = relations(*things) if len(things) == 2 else ()
    return world.holds_out([(thing.shape, thing.colour) for thing in things], *shown)


def _draw_scene(rng: np.random.Generator, category: str, world: World) -> Scene:
    """Draw a scene of a category, held out or not."""
    background = world.backgrounds[rng.integers(len(world.backgrounds))]
    match category:
        case "single":
            names = [_draw_name(rng, world)]
            places = [_draw_disc(rng, world, _draw_bounds(rng, world, world.radius))]
        case "count":
            count = COUNTS[rng.integers(len(COUNTS))]
            names = [_draw_name(rng, world)] * count
            places = _draw_discs(rng, world, [_draw_bounds(rng, world, world.radius_count, count)] * count)
        case "inside":
            names = [_draw_name(rng, world), ("ring", _draw_name(rng, world)[1])]
            while names[0][0] == "ring":
                names[0] = _draw_name(rng, world)
            places = _draw_nested_discs(rng, world)
        case _:
            names = [_draw_name(rng, world), _draw_name(rng, world)]
            while names[0] == names[1]:
                names[1] = _draw_name(rng, world)
            bounds = [_draw_bounds(rng, world, world.radius_crowded) for _ in names]
            places = _draw_discs(rng, world, bounds, clear=category == "relation")
    like = category == "count"
    textures = [_draw_texture(rng, world)] * len(names) if like else [_draw_texture(rng, world) for _ in names]
    things = tuple(
        SceneObject(shape=shape, colour=colour, x=x, y=y, radius=radius, texture=texture, size=world.size_of(radius))
        for (shape, colour), (x, y, radius), texture in zip(names, places, textures, strict=True)
    )
    relation = next(iter(relations(*things))) if category in ("relation", "inside") else None
    return Scene(
        objects=things, background=background, relation=relation, size=world.size, gradient=_draw_gradient(rng, world)
    )


def _caption_content(rng: np.random.Generator, scene: Scene, world: World) -> list[Wanted]:
    """Choose the looks that the caption says: shape, colour, a texture that is not solid, sometimes the rest."""
    wanted: list[Wanted] = []
    for thing in scene.objects:
        texture = thing.texture != "solid" or (len(world.textures) > 1 and rng.random() < _SOLID_RATE)
        size = thing.size and rng.random() < _SIZE_RATE
        wanted.append((thing.shape, thing.colour, thing.texture if texture else None, thing.size if size else None))
    return wanted


def _in_reading_order(mentions: Sequence[Mention], scene: Scene) -> tuple[Mention, ...]:
    """Sort two mentions in reading order: the left or upper one first, by the axis on which they are further apart."""

    def towards_bottom_right(mention: Mention) -> float:
        thing = scene.objects[mention.things[0]]
        return thing.x + thing.y

    return tuple(sorted(mentions, key=towards_bottom_right))


def _with_place(rng: np.random.Generator, mention: Mention, scene: Scene) -> Mention:
    """Add words for the object's place in the image to its mention, where that is well to one side."""
    thing = scene.objects[mention.things[0]]
    dx, dy = thing.x - scene.size / 2, thing.y - scene.size / 2
    if max(abs(dx), abs(dy)) < _ASIDE * scene.size:
        return mention
    horizontal, vertical = ("left" if dx < 0 else "right"), ("top" if dy < 0 else "bottom")
    wordings = PLACES[horizontal if abs(dx) > abs(dy) else vertical]
    return replace(mention, place=wordings[rng.integers(len(wordings))])


def _draw_bounds(
    rng: np.random.Generator, world: World, otherwise: tuple[float, float], count: int = 1
) -> tuple[float, float]:
    """Draw a radius's bounds: those of a random size in a world with sizes; the greatest ``count`` is of small ones."""
    sizes = [bounds for _, bounds in world.sizes]
    if not sizes:
        return otherwise
    return sizes[0 if count == COUNTS[-1] else rng.integers(len(sizes))]


def _draw_texture(rng: np.random.Generator, world: World) -> str:
    """Draw a texture, where there are several."""
    return world.textures[0] if len(world.textures) == 1 else world.textures[rng.integers(len(world.textures))]


def _draw_gradient(rng: np.random.Generator, world: World) -> tuple[float, float]:
    """Draw the background's gradient (right, down) in levels, in any direction; corners keep to the world's limit."""
    if not world.gradient:
        return 0.0, 0.0
    strength, angle = rng.random(2).tolist()
    strength, angle = strength * world.gradient / math.sqrt(2), angle * 2 * math.pi
    return round(strength * math.cos(angle), 2), round(strength * math.sin(angle), 2)


def _draw_nested_discs(rng: np.random.Generator, world: World) -> list[_Disc]:
    """Draw a disc and a ring around it, with a gap between them."""
    x, y, ring = _draw_disc(rng, world, world.radius_ring)
    large, far, angle = rng.random(3).tolist()
    radius = round(world.radius_inside[0] + large * (world.radius_inside[1] - world.radius_inside[0]), 2)
    off, angle = far * (RING_HOLE * ring - radius - world.gap), angle * 2 * math.pi
    return [(round(x + off * math.cos(angle), 2), round(y + off * math.sin(angle), 2), radius), (x, y, ring)]


def _draw_name(rng: np.random.Generator, world: World) -> tuple[str, str]:
    """Draw a shape and a colour."""
    shape, colour = divmod(int(rng.integers(len(world.shapes) * len(world.colours))), len(world.colours))
    return world.shapes[shape], world.colours[colour]


def _draw_disc(rng: np.random.Generator, world: World, bounds: tuple[float, float]) -> _Disc:
    """Draw x, y and radius in pixels, with the whole disc inside the image."""
    across, down, large = rng.random(3).tolist()
    radius = round(bounds[0] + large * (bounds[1] - bounds[0]), 2)
    edge = radius + EDGE_MARGIN
    x, y = (round(edge + at * (world.size - 2 * edge), 2) for at in (across, down))
    return x, y, radius


def _draw_discs(
    rng: np.random.Generator, world: World, bounds: Sequence[tuple[float, float]], *, clear: bool = False
) -> list[_Disc]:
    """Draw a disc for each of the ``bounds``, with gaps; ``clear`` ones stand beside or above each other."""
    while True:
        places = [_draw_disc(rng, world, one) for one in bounds]
        if all(_have_gap(one, other, world.gap, clear=clear) for one, other in combinations(places, 2)):
            return places


def _have_gap(one: _Disc, other: _Disc, gap: float, *, clear: bool) -> bool:
    """Return True where two discs leave a gap and, where ``clear``, are not on a diagonal."""
    (x, y, r), (u, v, s) = one, other
    dx, dy = abs(x - u), abs(y - v)
    apart = (dx * dx + dy * dy) ** 0.5 >= r + s + gap
    return apart and (not clear or max(dx, dy) > _CLEAR * min(dx, dy))
