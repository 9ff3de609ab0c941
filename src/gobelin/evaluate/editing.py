"""Whether a changed word changes its object and nothing else: an edit, prompt-to-prompt alone, and painting anew.

Captions of the test list whose picture the grader finds right get another colour word. Afterwards the picture should
answer to the new caption, and every object should be where it was, of the shape it was.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from gobelin.errors import UsageError
from gobelin.evaluate.attribution import found_masks
from gobelin.evaluate.intervals import Share
from gobelin.pipeline import Pipeline
from gobelin.scenes import Sample, Seen, World, grade, sample
from gobelin.scenes.captions import Phrasing
from gobelin.scenes.relations import Wanted, answers

SEED = 78  # of the scenes, apart from training's and attribution's
BATCH = 16
MOST_TRIED = 16  # captions for each edit that is wanted
SAME_PLACE = 0.5  # intersection over union with where an object was
_ALONE: dict[str, Any] = {"together": True, "own": 0.4, "push": 0.0, "blend": ()}
METHODS: dict[str, dict[str, Any]] = {
    "edit": {},
    "prompt-to-prompt alone": _ALONE,
    "painted anew": {**_ALONE, "cross": 0.0, "own": 0.0},
}
"""What :meth:`gobelin.pipeline.Pipeline.edit` is told; all begin with the noise of the picture before."""


@dataclass(frozen=True, kw_only=True)
class Recolouring:
    """A caption, and the same with another colour at the ``mention`` of that number."""

    before: Phrasing
    after: Phrasing
    mention: int


@dataclass(frozen=True, kw_only=True)
class _Right:
    """A caption whose picture with this ``seed`` is right, and what the grader saw in it."""

    change: Recolouring
    seed: int
    seen: list[Seen]


def measure(pipeline: Pipeline, world: World, count: int, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The first ``count`` captions whose picture is right, or as many as there are, edited in both ways, as JSON.

    ``advance`` hears of each edited caption. Raises :class:`UsageError` where no caption's picture is right.
    """
    found: dict[str, list[tuple[bool, bool]]] = {name: [] for name in METHODS}
    for right in _right(pipeline, world, count):
        before, after = right.change.before, right.change.after
        for name, options in METHODS.items():
            seen = grade(pipeline.edit(before.text, after.text, seed=right.seed, **options).images[1], world)
            answer = found_masks(after, seen) is not None
            found[name].append((answer, kept(before.mentions[right.change.mention].wanted, right.seen, seen)))
        advance()
    edits = len(next(iter(found.values())))
    if not edits:
        raise UsageError(f"the model painted none of {MOST_TRIED * count:,} captions right: there is nothing to edit")
    return {
        "edits": edits,
        "methods": {
            name: {
                "answers": asdict(Share.of([answer for answer, _ in outcomes])),
                "keeps": asdict(Share.of([keeps for _, keeps in outcomes])),
                "both": asdict(Share.of([answer and keeps for answer, keeps in outcomes])),
            }
            for name, outcomes in found.items()
        },
    }


def recoloured(each: Sample, world: World, seed: int) -> Recolouring | None:
    """A caption with one colour word changed to one that nothing has; None where it names none, or none is left."""
    rng = np.random.default_rng(seed)
    phrasing = each.phrasing
    coloured = [number for number, mention in enumerate(phrasing.mentions) if mention.colour]
    if not coloured:
        return None
    number = int(rng.choice(coloured))
    mention = phrasing.mentions[number]
    shape = each.scene.objects[mention.things[0]].shape
    there = {thing.colour for thing in each.scene.objects}
    free = [one for one in world.colours if one not in there and (shape, one) not in world.held_out_pairs]
    if not free:
        return None
    mentions = list(phrasing.mentions)
    mentions[number] = replace(mention, colour=str(rng.choice(free)))
    return Recolouring(before=phrasing, after=replace(phrasing, mentions=tuple(mentions)), mention=number)


def kept(changed: Wanted, before: Sequence[Seen], after: Sequence[Seen]) -> bool:
    """Whether every object is where it was, of its shape and, unless it answers to ``changed``, of its colour."""

    def still(thing: Seen) -> bool:
        return any(
            thing.shape == other.shape
            and (thing.colour == other.colour or answers(changed, thing))
            and (thing.mask & other.mask).sum() >= SAME_PLACE * (thing.mask | other.mask).sum()
            for other in after
        )

    return len(before) == len(after) and all(map(still, before))


def _right(pipeline: Pipeline, world: World, count: int) -> Iterator[_Right]:
    """The first ``count`` captions of the list whose picture is right, in batches."""
    found = 0
    for start in range(0, MOST_TRIED * count, BATCH):
        indices = range(start, start + BATCH)
        changes = [(index, recoloured(sample(SEED, index, world, "test"), world, index)) for index in indices]
        wanted = [(SEED + index, change) for index, change in changes if change is not None]
        if not wanted:
            continue
        images = pipeline([change.before.text for _, change in wanted], seed=[seed for seed, _ in wanted]).images
        for (seed, change), image in zip(wanted, images, strict=True):
            if found == count:
                return
            seen = grade(image, world)
            if found_masks(change.before, seen) is not None:
                found += 1
                yield _Right(change=change, seed=seed, seen=seen)
