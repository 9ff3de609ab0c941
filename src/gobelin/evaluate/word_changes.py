"""Word changes: pairs of captions that differ in one thing that they say."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from gobelin.scenes import Sample, World
from gobelin.scenes.captions import Phrasing
from gobelin.scenes.relations import INVERSE
from gobelin.scenes.world import COUNTS

WordKind = Literal["colour", "shape", "number", "relation"]
WORD_KINDS: tuple[WordKind, ...] = ("colour", "shape", "number", "relation")


@dataclass(frozen=True, kw_only=True)
class WordChange:
    """A caption, and the same with one word changed, which is about the ``mentions`` of these numbers."""

    kind: WordKind
    before: Phrasing
    after: Phrasing
    mentions: tuple[int, ...]


def change_word(each: Sample, world: World, kind: WordKind, seed: int) -> WordChange | None:
    """Change what a sample's caption says of a colour, a shape, a number or a relation.

    A colour or a shape becomes one that no object of the scene has, a number one more or one less, a relation its
    inverse. Returns None where the caption says no such thing, and where all that is left was held out of training.
    """
    rng = np.random.default_rng(seed)
    if kind == "number":
        change = _recount(each.phrasing, rng)
    elif kind == "relation":
        change = _inverted(each.phrasing)
    else:
        change = _change_look(each, world, kind, rng)
    if change is None or world.holds_out(change.after.wanted, *filter(None, [change.after.relation])):
        return None
    return change


def _change_look(
    each: Sample, world: World, kind: Literal["colour", "shape"], rng: np.random.Generator
) -> WordChange | None:
    """Change the colour or the shape of a mention that says it."""
    said = [number for number, mention in enumerate(each.phrasing.mentions) if getattr(mention, kind)]
    if not said:
        return None
    number = int(rng.choice(said))
    mention = each.phrasing.mentions[number]
    thing = each.scene.objects[mention.things[0]]
    there = {getattr(other, kind) for other in each.scene.objects}
    free = [
        value
        for value in (world.colours if kind == "colour" else world.shapes)
        if value not in there
        and ((thing.shape, value) if kind == "colour" else (value, thing.colour)) not in world.held_out_pairs
    ]
    if not free:
        return None
    mentions = list(each.phrasing.mentions)
    mentions[number] = replace(mention, **{kind: str(rng.choice(free))})
    after = replace(each.phrasing, mentions=tuple(mentions))
    return WordChange(kind=kind, before=each.phrasing, after=after, mentions=(number,))


def _recount(before: Phrasing, rng: np.random.Generator) -> WordChange | None:
    """Ask for one more or one less of what is counted."""
    if before.count is None:
        return None
    count = int(rng.choice([other for other in COUNTS if abs(other - before.count) == 1]))
    mention = replace(before.mentions[0], things=tuple(range(count)))
    after = replace(before, count=count, mentions=(mention,))
    return WordChange(kind="number", before=before, after=after, mentions=(0,))


def _inverted(before: Phrasing) -> WordChange | None:
    """Turn a relation round."""
    if before.relation is None:
        return None
    after = replace(before, relation=INVERSE[before.relation])
    return WordChange(kind="relation", before=before, after=after, mentions=(0, 1))
