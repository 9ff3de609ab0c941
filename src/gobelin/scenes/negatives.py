"""Hard negatives: captions that are wrong about an image in one respect."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from gobelin.scenes.captions import Phrasing
from gobelin.scenes.relations import INVERSE, found_in
from gobelin.scenes.sampling import Sample
from gobelin.scenes.world import COUNTS, World


def hard_negatives(sample: Sample, seed: int) -> list[str]:
    """Hard negatives: word captions like the sample's own that are false of its scene.

    One with the colours swapped and one with the relation turned round, where there are two objects, one with
    a number beside the true one, where they are counted, and for each mention one with another colour and one
    with another shape; where the caption says a texture, a size or a background, one with another. All are drawn
    with ``seed`` ≥ 0. Captions that would still be true are left out, and so is everything that the world holds
    out, unless the sample is itself from the "heldout" split.
    """
    chosen = []
    for options in _changes(sample.phrasing, sample.world, np.random.default_rng(seed)):
        false = next((option for option in options if _false(option, sample)), None)
        if false:
            chosen.append(false.text)
    return chosen


def _changes(phrasing: Phrasing, world: World, rng: np.random.Generator) -> Iterator[Iterable[Phrasing]]:
    """List, for each respect in which the caption can be wrong, its false versions in random order."""
    mentions = phrasing.mentions

    def changed(at: int, **fields: str) -> Phrasing:
        return replace(phrasing, mentions=(*mentions[:at], replace(mentions[at], **fields), *mentions[at + 1 :]))

    if len(mentions) == 2 and mentions[0].colour and mentions[1].colour:
        swapped = (replace(mentions[0], colour=mentions[1].colour), replace(mentions[1], colour=mentions[0].colour))
        yield [replace(phrasing, mentions=swapped)]
    if phrasing.relation:
        yield [replace(phrasing, relation=INVERSE[phrasing.relation])]
    if phrasing.count:
        beside = [count for count in COUNTS if abs(count - phrasing.count) == 1]
        yield (replace(phrasing, count=count) for count in rng.permutation(beside).tolist())
    if phrasing.background:
        grounds = rng.permutation(world.backgrounds).tolist()
        yield (replace(phrasing, background=ground) for ground in grounds)
    for at, mention in enumerate(mentions):
        if mention.colour:
            yield (changed(at, colour=colour) for colour in rng.permutation(world.colours).tolist())
        if mention.shape:
            yield (changed(at, shape=shape) for shape in rng.permutation(world.shapes).tolist())
        if mention.texture:
            yield (changed(at, texture=texture) for texture in rng.permutation(world.textures).tolist())
        if mention.size:
            yield (changed(at, size=size) for size in rng.permutation([size for size, _ in world.sizes]).tolist())


def _false(option: Phrasing, sample: Sample) -> bool:
    """Return True where a caption is false of the scene and says nothing that is held out."""
    there = found_in(option.wanted, option.relation, sample.scene.objects, count=option.count)
    if there and option.background in (None, sample.scene.background):
        return False
    relation = (option.relation,) if option.relation else ()
    return sample.split == "heldout" or not sample.world.holds_out(option.wanted, *relation)
