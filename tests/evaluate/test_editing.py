"""Editing, measured on scenes whose edits are known to be right or wrong."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gobelin.errors import UsageError
from gobelin.evaluate.attribution import found_masks
from gobelin.evaluate.editing import MOST_TRIED, SEED, Recolouring, kept, measure, recoloured
from gobelin.pipeline import Pipeline
from gobelin.scenes import CORE, Sample, grade, render, sample
from gobelin.scenes.relations import Wanted, answers

NUMBERS = range(40)


def edited(each: Sample, change: Recolouring) -> NDArray[np.uint8]:
    """What a perfect edit would paint."""
    mention = change.after.mentions[change.mention]
    objects = list(each.scene.objects)
    for place in mention.things:
        objects[place] = replace(objects[place], colour=str(mention.colour))
    return render(replace(each.scene, objects=tuple(objects)))[0]


def wanted(change: Recolouring) -> Wanted:
    return change.before.mentions[change.mention].wanted


def drawn(index: int) -> Sample:
    return sample(SEED, index, CORE, "test")


CHANGES = [
    (each, change) for index in range(40) if (change := recoloured(each := drawn(index), CORE, index)) is not None
]


def test_one_colour_word_changes_to_one_that_nothing_has() -> None:
    assert 20 < len(CHANGES) < 40  # some captions name no colour
    for each, change in CHANGES:
        mention = change.after.mentions[change.mention]
        assert mention.colour not in {thing.colour for thing in each.scene.objects}
        assert (each.scene.objects[mention.things[0]].shape, mention.colour) not in CORE.held_out_pairs
        before, after = change.before.text.split(), change.after.text.split()
        differing = [
            (one, other) for one, other in zip(before, after, strict=True) if one.strip(",") != other.strip(",")
        ]
        assert [pair for pair in differing if pair not in {("a", "an"), ("an", "a")}] == [
            (wanted(change)[1], mention.colour)
        ]
        assert recoloured(each, CORE, 3) == recoloured(each, CORE, 3)


def test_a_caption_without_colours_is_not_changed() -> None:
    for each, change in CHANGES[:5]:
        bare = replace(each.phrasing, mentions=tuple(replace(m, colour=None) for m in each.phrasing.mentions))
        assert recoloured(replace(each, phrasing=bare), CORE, 0) is None
        assert recoloured(each, replace(CORE, colours=(str(wanted(change)[1]),)), 0) is None


def test_a_perfect_edit_keeps_everything_and_answers() -> None:
    told = 0
    for each, change in CHANGES:
        before, after = grade(each.image, CORE), grade(edited(each, change), CORE)
        if found_masks(change.before, before) is not None:
            told += 1
            assert kept(wanted(change), before, after)
            assert found_masks(change.after, after) is not None
            assert found_masks(change.after, before) is None
            assert not kept(wanted(change), before, after[1:])
    assert told > 20


def test_what_moved_or_changed_besides_is_not_kept() -> None:
    for each, change in CHANGES:
        before = grade(each.image, CORE)
        moved = [replace(thing, mask=np.roll(thing.mask, (20, 20), axis=(0, 1))) for thing in before]
        assert not kept(wanted(change), before, moved)
        assert not kept(wanted(change), before, [replace(thing, shape="blob") for thing in before])
        others = [thing for thing in before if not answers(wanted(change), thing)]
        painted = [replace(thing, colour="other") for thing in before]
        assert kept(wanted(change), before, painted) == (not others)


class Painter(Pipeline):
    """Paints the scenes of the list; edits them well or, where options say otherwise, paints the next one."""

    def __init__(self) -> None:
        self.unable = False

    def __call__(self, prompts: list[str], *, seed: list[int]) -> SimpleNamespace:
        pictures = (np.full((64, 64, 3), 175, np.uint8) if self.unable else drawn(each - SEED).image for each in seed)
        return SimpleNamespace(images=list(map(Image.fromarray, pictures)))

    def edit(self, prompt: str, to: str, *, seed: int, **options: Any) -> SimpleNamespace:
        each = drawn(seed - SEED)
        change = recoloured(each, CORE, seed - SEED)
        assert change is not None
        assert (prompt, to) == (change.before.text, change.after.text)
        image = drawn(seed - SEED + 1).image if options else edited(each, change)
        return SimpleNamespace(images=[Image.fromarray(each.image), Image.fromarray(image)])


def test_methods_are_told_apart() -> None:
    heard: list[None] = []
    content = measure(Painter(), CORE, 12, lambda: heard.append(None))
    assert content["edits"] == len(heard) == 12
    well, anew = content["methods"]["edit"], content["methods"]["painted anew"]
    assert [well[what]["value"] for what in ("answers", "keeps", "both")] == [1.0, 1.0, 1.0]
    assert well["both"]["n"] == 12
    assert anew["both"]["value"] == 0.0


def test_a_model_that_paints_nothing_right_is_said() -> None:
    painter = Painter()
    painter.unable = True
    with pytest.raises(UsageError, match=f"none of {MOST_TRIED * 8} captions right"):
        measure(painter, CORE, 8)
