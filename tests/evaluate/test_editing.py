"""Editing, measured on scenes whose edits are known to be right or wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gobelin.errors import UsageError
from gobelin.evaluate.attribution import found_masks
from gobelin.evaluate.editing import (
    EDITING_SEED,
    METHODS,
    TRIES_PER_EDIT,
    editing_report,
    keeps_objects,
    measure_editing,
    moved_outside,
)
from gobelin.evaluate.word_changes import WORD_KINDS, WordChange, WordKind, change_word
from gobelin.pipeline import Pipeline
from gobelin.scenes import CORE, Sample, SceneObject, grade, render, sample
from gobelin.scenes.relations import Wanted, answers

NUMBERS = range(40)


def edited(each: Sample, change: WordChange) -> NDArray[np.uint8]:
    """What a perfect edit would paint."""
    mention = change.after.mentions[change.mentions[0]]
    objects = list(each.scene.objects)
    if change.kind == "relation":
        first, second = objects
        objects = [replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)]
    elif change.kind == "number":
        objects = with_room(objects)[: change.after.count]
    else:
        for place in mention.things:
            objects[place] = replace(objects[place], **{change.kind: str(getattr(mention, change.kind))})
    return render(replace(each.scene, objects=tuple(objects)))[0]


def with_room(objects: list[SceneObject]) -> list[SceneObject]:
    """These and one more that is like them, where it touches none."""
    radius = objects[0].radius
    for x, y in product(range(11, 64, 3), repeat=2):
        if all(np.hypot(x - one.x, y - one.y) > radius + one.radius + 3 for one in objects):
            return [*objects, replace(objects[0], x=x, y=y)]
    return objects


def wanted(change: WordChange) -> Wanted:
    return change.before.mentions[change.mentions[0]].wanted


def drawn(index: int) -> Sample:
    return sample(EDITING_SEED, index, CORE, "test")


def changes(kind: WordKind) -> list[tuple[Sample, WordChange]]:
    """All of the first captions that say such a thing, changed."""
    drawn_ones = ((index, drawn(index)) for index in NUMBERS)
    return [(each, change) for index, each in drawn_ones if (change := change_word(each, CORE, kind, index))]


CHANGES = [
    (each, change)
    for index in range(40)
    if (change := change_word(each := drawn(index), CORE, "colour", index)) is not None
]


def test_one_colour_word_changes_to_one_that_nothing_has() -> None:
    assert 20 < len(CHANGES) < 40  # some captions name no colour
    for each, change in CHANGES:
        mention = change.after.mentions[change.mentions[0]]
        assert mention.colour not in {thing.colour for thing in each.scene.objects}
        assert (each.scene.objects[mention.things[0]].shape, mention.colour) not in CORE.held_out_pairs
        before, after = change.before.text.split(), change.after.text.split()
        differing = [
            (one, other) for one, other in zip(before, after, strict=True) if one.strip(",") != other.strip(",")
        ]
        assert [pair for pair in differing if pair not in {("a", "an"), ("an", "a")}] == [
            (wanted(change)[1], mention.colour)
        ]
        assert change_word(each, CORE, "colour", 3) == change_word(each, CORE, "colour", 3)


def test_a_caption_without_colours_is_not_changed() -> None:
    for each, change in CHANGES[:5]:
        bare = replace(each.phrasing, mentions=tuple(replace(m, colour=None) for m in each.phrasing.mentions))
        assert change_word(replace(each, phrasing=bare), CORE, "colour", 0) is None
        assert change_word(each, replace(CORE, colours=(str(wanted(change)[1]),)), "colour", 0) is None


@pytest.mark.parametrize("kind", WORD_KINDS)
def test_captions_differ_in_what_the_word_is_about(kind: WordKind) -> None:
    found = changes(kind)
    assert len(found) >= 5
    for each, change in found:
        assert change.before == each.phrasing
        assert change.before.text != change.after.text
        assert change.before.template == change.after.template
        assert (change.before.relation == change.after.relation) == (kind != "relation")
        assert (change.before.count == change.after.count) == (kind != "number")
        assert not CORE.holds_out(change.after.wanted, *filter(None, [change.after.relation]))
        looks = [(one.shape, one.colour) for one in change.before.mentions]
        other_looks = [(one.shape, one.colour) for one in change.after.mentions]
        differing = sum(one != other for one, other in zip(looks, other_looks, strict=True))
        assert differing == (kind in ("colour", "shape"))


@pytest.mark.parametrize("kind", WORD_KINDS)
def test_a_perfect_edit_keeps_everything_and_answers(kind: WordKind) -> None:
    told = 0
    for each, change in changes(kind):
        before, after = grade(each.image, CORE), grade(edited(each, change), CORE)
        if found_masks(change.before, before) is not None:
            told += 1
            if found_masks(change.after, after) is None:  # no room, or the grader takes two for one
                assert kind in ("number", "shape")
                told -= 1
                continue
            assert keeps_objects(change, before, after)
            assert found_masks(change.after, before) is None
            if kind != "number":
                assert not keeps_objects(change, before, after[1:])
            else:
                assert not keeps_objects(change, before, [replace(one, colour="other") for one in after])
    assert told >= {"colour": 20, "shape": 15, "number": 5, "relation": 4}[kind]


def test_what_moved_or_changed_besides_is_not_kept() -> None:
    for each, change in CHANGES:
        before = grade(each.image, CORE)
        moved = [replace(thing, mask=np.roll(thing.mask, (20, 20), axis=(0, 1))) for thing in before]
        assert not keeps_objects(change, before, moved)
        assert not keeps_objects(change, before, [replace(thing, shape="blob") for thing in before])
        others = [thing for thing in before if not answers(wanted(change), thing)]
        painted = [replace(thing, colour="other") for thing in before]
        assert keeps_objects(change, before, painted) == (not others)


def disc(x: int, y: int, radius: int = 8) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[:64, :64]
    return np.hypot(columns - x, rows - y) <= radius


def painted(*discs: tuple[NDArray[np.bool_], int]) -> NDArray[np.uint8]:
    """A grey image with discs of other levels."""
    image = np.full((64, 64, 3), 175, np.uint8)
    for mask, level in discs:
        image[mask, 1] = level
    return image


def test_a_change_of_the_object_alone_is_not_outside() -> None:
    here, near = disc(20, 32), disc(23, 32)
    before = painted((here, 20), (disc(48, 32), 90))
    for after, mask in (
        (painted((here, 240), (disc(48, 32), 90)), here),  # another colour
        (painted((near, 20), (disc(48, 32), 90)), near),  # a few pixels further
        (painted((disc(20, 32, 12), 240), (disc(48, 32), 90)), here),  # larger by the rim of 4 pixels
    ):
        assert moved_outside(before, after, here, mask) == 0
    noise = np.random.default_rng(0).integers(-8, 9, before.shape)
    assert moved_outside(before, (before + noise).astype(np.uint8), here, here) == 0


def test_a_change_elsewhere_is_counted_by_its_pixels() -> None:
    here, there = disc(20, 32), disc(48, 32)
    before = painted((here, 20), (there, 90))
    outside = 64 * 64 - sum(
        any(here[max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5].flat) for y in range(64) for x in range(64)
    )
    recoloured_too = painted((here, 240), (there, 107))  # by 17 levels in one channel
    assert moved_outside(before, recoloured_too, here, here) == pytest.approx(there.sum() / outside)
    assert moved_outside(before, painted((here, 240), (there, 106)), here, here) == 0  # by 16
    assert moved_outside(before, 255 - before, here, here) == 1
    grown = painted((disc(20, 32, 16), 20), (there, 90))  # beyond the rim, whatever the grader saw
    assert moved_outside(before, grown, here, here) > 0.05
    everywhere = np.ones_like(here)
    assert moved_outside(before, 255 - before, everywhere, here) == 0, "nothing is outside"


class Painter(Pipeline):
    """Generates the scenes of the list; edits them by ``repaint``, or where options are given, into the next scene."""

    name = "painter"

    def __init__(self, repaint: Callable[[Sample, WordChange], NDArray[np.uint8]] = edited) -> None:
        self.unable = False
        self.repaint = repaint

    def __call__(self, prompts: list[str], *, seed: list[int]) -> SimpleNamespace:
        images = (
            np.full((64, 64, 3), 175, np.uint8) if self.unable else drawn(each - EDITING_SEED).image for each in seed
        )
        return SimpleNamespace(images=list(map(Image.fromarray, images)))

    def edit(self, prompt: str, to: str, *, seed: int, **options: Any) -> SimpleNamespace:
        each = drawn(seed - EDITING_SEED)
        found = (change_word(each, CORE, kind, seed - EDITING_SEED) for kind in WORD_KINDS)
        (change,) = (one for one in found if one and (prompt, to) == (one.before.text, one.after.text))
        image = drawn(seed - EDITING_SEED + 1).image if options else self.repaint(each, change)
        return SimpleNamespace(images=[Image.fromarray(each.image), Image.fromarray(image)])


def on_another_background(each: Sample, change: WordChange) -> NDArray[np.uint8]:
    """A perfect edit of the object, on a background that changed."""
    background = {"grey": "sand", "sage": "sand", "sand": "sage"}[each.scene.background]
    return edited(replace(each, scene=replace(each.scene, background=background)), change)


def test_methods_are_told_apart() -> None:
    advanced: list[None] = []
    result = measure_editing(Painter(), CORE, 12, ["colour"], lambda: advanced.append(None))
    measured = result.kinds["colour"]
    assert measured.edits == len(advanced) == 12
    assert (result.model, result.world) == ("painter", "core")
    assert measured.methods.keys() == METHODS.keys()
    well, anew = measured.methods["edit"], measured.methods["painted anew"]
    for share in (well.answers, well.keeps, well.both, well.outside_kept, well.all):
        assert (share.value, share.n) == (1.0, 12)
    assert (well.outside.value, well.outside.n) == (0.0, 12)
    assert anew.both.value == anew.all.value == 0.0
    assert anew.outside.value > 0.05


def test_an_edit_that_repaints_the_background_is_right_about_objects_and_seen() -> None:
    score = measure_editing(Painter(on_another_background), CORE, 12, ["colour"]).kinds["colour"].methods["edit"]
    assert score.both.value == 1.0
    assert score.outside.value > 0.9
    assert score.outside_kept.value == score.all.value == 0.0


def test_a_neighbour_that_changed_too_is_outside() -> None:
    def all_recoloured(each: Sample, change: WordChange) -> NDArray[np.uint8]:
        colour = str(change.after.mentions[change.mentions[0]].colour)
        objects = tuple(replace(thing, colour=colour) for thing in each.scene.objects)
        return render(replace(each.scene, objects=objects))[0]

    score = measure_editing(Painter(all_recoloured), CORE, 12, ["colour"]).kinds["colour"].methods["edit"]
    alone = sum(
        len(each.scene.objects) == len(change.after.mentions[change.mentions[0]].things) for each, change in CHANGES
    )
    assert 0 < alone < len(CHANGES)
    assert 0 < score.outside.value < 0.2, "only the neighbours' pixels, and only of some scenes"


def test_the_report_has_a_row_a_method_and_says_what_is_outside() -> None:
    content = json.loads(json.dumps(measure_editing(Painter(), CORE, 2).to_json(), allow_nan=False))
    report = editing_report(content)
    assert len(report.tables) == len(WORD_KINDS)
    for table, kind in zip(report.tables, WORD_KINDS, strict=True):
        assert kind in table.title
        assert [row[0] for row in table.rows] == list(METHODS)
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert report.tables[0].rows[0][1:5] == (*["1.000 [0.342, 1.000]"] * 3, "0.000 ± 0.000")
    assert "more than 16 of 255 levels" in report.tables[-1].note
    assert "dilated by 4 pixels" in report.tables[-1].note
    assert "both, and outside ≤ 0.05" in report.markdown()


def test_a_model_that_gets_no_image_right_is_refused() -> None:
    painter = Painter()
    painter.unable = True
    with pytest.raises(UsageError, match=f"none of {TRIES_PER_EDIT * 8} captions has a right image"):
        measure_editing(painter, CORE, 8)
