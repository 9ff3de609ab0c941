"""Hard negatives: captions that are wrong about an image in one respect."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gobelin.scenes.captions import Phrasing
from gobelin.scenes.relations import INVERSE, found_in
from gobelin.scenes.sampling import Sample


def hard_negatives(sample: Sample, seed: int) -> list[str]:
    """Captions in the sample's own wording that are false of its scene.

    One with the colours swapped and one with the relation turned round, where there are two objects, and for
    each object one with another colour and one with another shape, drawn with ``seed`` ≥ 0. What would still
    be true is left out, and so is what the world holds out, unless the sample is itself of the "heldout"
    split.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for options in _changes(sample.phrasing, sample):
        false = [option for option in options if _false(option, sample)]
        if false:
            chosen.append(false[rng.integers(len(false))].text)
    return chosen


def _changes(phrasing: Phrasing, sample: Sample) -> list[Sequence[Phrasing]]:
    """For each respect in which the caption can be wrong, the ways to be so."""
    changes: list[Sequence[Phrasing]] = []
    mentions = phrasing.mentions
    if len(mentions) == 2:
        first, second = mentions
        if first.colour and second.colour:
            swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
            changes.append([replace(phrasing, mentions=swapped)])
    if phrasing.relation:
        changes.append([replace(phrasing, relation=INVERSE[phrasing.relation])])
    for at, mention in enumerate(mentions):
        others = (
            [replace(mention, colour=colour) for colour in sample.world.colours if mention.colour],
            [replace(mention, shape=shape) for shape in sample.world.shapes if mention.shape],
        )
        changes += [
            [replace(phrasing, mentions=(*mentions[:at], o, *mentions[at + 1 :])) for o in kind] for kind in others
        ]
    return changes


def _false(option: Phrasing, sample: Sample) -> bool:
    """Whether a caption is false of the scene, and says nothing that is held out."""
    if found_in(option.wanted, option.relation, sample.scene.objects):
        return False
    relation = (option.relation,) if option.relation else ()
    return sample.split == "heldout" or not sample.world.holds_out(option.wanted, *relation)
