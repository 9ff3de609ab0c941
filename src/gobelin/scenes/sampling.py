"""The sampler: (seed, index) → image, caption, scene and masks."""

from dataclasses import dataclass
from itertools import combinations
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from gobelin.errors import UsageError
from gobelin.scenes.captions import Phrasing, phrase, templates
from gobelin.scenes.relations import relations
from gobelin.scenes.render import render
from gobelin.scenes.scene import Scene, SceneObject
from gobelin.scenes.world import CORE, COUNTS, MARGIN, SPLITS, World

# A scene about a relation is never on the diagonal: the offset along one axis is this many times the other's.
_CLEAR = 1.7

_Disc = tuple[float, float, float]  # x, y and radius


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One captioned image.

    ``image`` is uint8 [size, size, 3] in [0, 255]; ``masks`` is bool [n, size, size], the visible pixels of
    each of ``scene.objects``; ``words`` gives each word of the caption, without punctuation, and the indices
    of the objects that it speaks of: one for a noun or a colour, both for a relation, all for a number and
    what it counts, none for the rest. ``phrasing`` is the caption before it was words, and ``category`` the
    kind of scene: "single", "two", "relation" or "count".
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
    wanted = [(thing.shape, thing.colour) for thing in scene.objects]
    count = len(wanted) if category == "count" else None
    phrasing = phrase(
        rng,
        wanted[:1] if count else wanted,
        scene.relation,
        choices[rng.integers(len(choices))],
        count=count,
        underspecified=world.underspecified,
        colourless=world.colourless,
    )
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
    if category == "single":
        names = [_name(rng, world)]
        places = [_place(rng, world, world.radius)]
    elif category == "count":
        count = COUNTS[rng.integers(len(COUNTS))]
        names = [_name(rng, world)] * count
        places = _places(rng, world, world.radius_count, count)
    else:
        names = [_name(rng, world), _name(rng, world)]
        while names[0] == names[1]:
            names[1] = _name(rng, world)
        places = _places(rng, world, world.radius_crowded, 2, clear=category == "relation")
    things = tuple(
        SceneObject(shape=shape, colour=colour, x=x, y=y, radius=radius)
        for (shape, colour), (x, y, radius) in zip(names, places, strict=True)
    )
    relation = next(iter(relations(*things))) if category == "relation" else None
    return Scene(objects=things, background=background, relation=relation, size=world.size)


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
    rng: np.random.Generator, world: World, bounds: tuple[float, float], count: int, *, clear: bool = False
) -> list[_Disc]:
    """Draw ``count`` discs that leave gaps; ``clear`` ones stand beside or above each other."""
    while True:
        places = [_place(rng, world, bounds) for _ in range(count)]
        if all(_apart(one, other, world.gap, clear=clear) for one, other in combinations(places, 2)):
            return places


def _apart(one: _Disc, other: _Disc, gap: float, *, clear: bool) -> bool:
    """Whether two discs leave a gap and, where it must be ``clear``, are not on a diagonal."""
    (x, y, r), (u, v, s) = one, other
    dx, dy = abs(x - u), abs(y - v)
    apart = (dx * dx + dy * dy) ** 0.5 >= r + s + gap
    return apart and (not clear or max(dx, dy) > _CLEAR * min(dx, dy))
