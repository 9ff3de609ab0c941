import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from gobelin.errors import UsageError
from gobelin.scenes import WORLDS, Sample, World, sample
from gobelin.scenes.captions import TEST_TEMPLATES
from gobelin.scenes.relations import RELATIONS, found_in, relations
from gobelin.scenes.world import COUNTS, SPLITS

ANY = {
    "seed": st.integers(0, 2**32),
    "index": st.integers(0, 2**40),
    "world": st.sampled_from(list(WORLDS.values())),
    "split": st.sampled_from(SPLITS),
}


def same(a: Sample, b: Sample) -> bool:
    return (
        (a.caption, a.words, a.scene, a.phrasing) == (b.caption, b.words, b.scene, b.phrasing)
        and np.array_equal(a.image, b.image)
        and np.array_equal(a.masks, b.masks)
    )


def test_a_sample_is_a_pure_function(world: World):
    forwards = [sample(3, index, world) for index in range(20)]
    backwards = [sample(3, index, world) for index in reversed(range(20))][::-1]
    assert all(map(same, forwards, backwards))
    assert not any(same(a, b) for a, b in combinations(forwards, 2))
    assert not same(sample(3, 0, world), sample(4, 0, world))
    assert not same(sample(3, 0, world), sample(3, 0, world, "dev"))


def test_the_sampler_has_not_changed():
    """A score is only comparable while (seed, index) means the same sample."""
    assert sample(0, 0).caption == "a scene with the ring"
    assert sample(0, 0, WORLDS["nano"]).caption == "just a yellow circle"


@given(**ANY)
@settings(max_examples=60, deadline=None)
def test_image_masks_and_scene_agree(seed, index, world, split):
    made = sample(seed, index, world, split)
    assert (made.image.shape, made.image.dtype) == ((world.size, world.size, 3), np.uint8)
    assert made.masks.shape == (len(made.scene.objects), world.size, world.size)
    assert len(made.scene.objects) <= world.max_objects
    assert made.masks.sum(axis=0).max() == 1
    assert not made.masks[:, [0, -1]].any()
    assert not made.masks[:, :, [0, -1]].any()
    for thing, mask in zip(made.scene.objects, made.masks, strict=True):
        bounds = {"single": world.radius, "count": world.radius_count}.get(made.category, world.radius_crowded)
        assert bounds[0] <= thing.radius <= bounds[1]
        rows, columns = np.nonzero(mask)
        assert np.hypot(rows + 0.5 - thing.y, columns + 0.5 - thing.x).max() <= thing.radius
    for one, other in combinations(made.masks, 2):
        assert ndimage.distance_transform_edt(~one)[other].min() >= 3


@given(**ANY)
@settings(max_examples=60, deadline=None)
def test_words_are_those_of_the_caption_and_know_their_objects(seed, index, world, split):
    made = sample(seed, index, world, split)
    assert [word for word, _ in made.words] == re.findall(r"\w+", made.caption)
    for word, indices in made.words:
        things = [made.scene.objects[at] for at in indices]
        if word in world.colours:
            assert {thing.colour for thing in things} == {word}
        elif word in world.shapes:
            assert [thing.shape for thing in things] == [word]
        elif word in ("stars", "circles", "things") and made.category == "count":
            assert indices == tuple(range(len(made.scene.objects)))
        elif word in ("two", "three", "four", "2", "3", "4") and made.category == "count":
            assert indices == tuple(range({"two": 2, "three": 3, "four": 4}.get(word) or int(word)))
        elif word in ("left", "right", "above", "below", "under", "over", "higher", "lower"):
            assert indices == (0, 1)
        elif word in ("a", "an", "the", "and", "there", "image"):
            assert indices == ()


@given(**ANY)
@settings(max_examples=60, deadline=None)
def test_captions_are_true(seed, index, world, split, read):
    made = sample(seed, index, world, split)
    objects, relation, count = read(made.caption)
    assert len(objects) == len(made.scene.objects)
    assert (relation is None) == (made.scene.relation is None)
    assert (count is None) == (made.category != "count")
    assert found_in(objects, relation, made.scene.objects, count=count)
    if made.scene.relation:
        assert relations(*made.scene.objects) == {made.scene.relation}


@pytest.mark.parametrize(("split", "count"), [("train", 3000), ("dev", 1000), ("test", 1000)])
def test_held_out_combinations_are_absent_and_all_else_occurs(world: World, split, count):
    objects, colours, shapes, shown, counted, mix = (Counter() for _ in range(6))
    for index in range(count):
        made = sample(11, index, world, split)
        things = made.scene.objects
        mix[made.scene.relation or made.category] += 1
        if made.category == "count":
            counted.update((len(things), thing.shape) for thing in things[:1])
        objects.update((thing.shape, thing.colour) for thing in things)
        shapes.update(thing.shape for thing in things)
        colours.update(thing.colour for thing in things)
        if len(things) == 2:
            a, b = things
            shown.update((a.shape, relation, b.shape) for relation in relations(a, b))
            shown.update((b.shape, relation, a.shape) for relation in relations(b, a))
        assert not world.holds_out(made.phrasing.wanted, *([made.phrasing.relation] if made.phrasing.relation else []))
    assert not world.held_out_pairs & set(objects)
    assert not world.held_out_relations & set(shown)
    assert not world.held_out_counts & set(counted)
    assert len(objects) == len(world.shapes) * len(world.colours) - len(world.held_out_pairs)
    total = objects.total()
    assert all(colours[colour] > 0.7 * total / len(world.colours) for colour in world.colours)
    assert all(shapes[shape] > 0.7 * total / len(world.shapes) for shape in world.shapes)
    weights = dict(world.mix)
    for category in set(world.categories) - {"relation"}:
        assert mix[category] / count == pytest.approx(weights[category], abs=0.05)
    if "count" in world.categories:
        assert set(counted) == set(product(COUNTS, world.shapes)) - world.held_out_counts
    assert all(mix[relation] / count > 0.2 * weights["relation"] for relation in RELATIONS)
    for relation in RELATIONS:
        assert {a for a, r, _ in shown if r == relation} == set(world.shapes)


def test_heldout_scenes_have_a_held_out_combination(world: World):
    kinds = Counter()
    for index in range(300):
        things = sample(11, index, world, "heldout").scene.objects
        shown = relations(*things) if len(things) == 2 else ()
        found = {
            "pair": any((thing.shape, thing.colour) in world.held_out_pairs for thing in things),
            "relation": any(
                (things[0].shape, relation, things[1].shape) in world.held_out_relations for relation in shown
            ),
            "count": any(item[::-1] in world.held_out_counts for item in Counter(t.shape for t in things).items()),
        }
        assert any(found.values())
        kinds.update(kind for kind, is_so in found.items() if is_so)
    assert set(kinds) == ({"pair", "relation", "count"} if "count" in world.categories else {"pair", "relation"})


def test_only_test_splits_use_test_templates(world: World):
    kept = {template for category in world.categories for template in TEST_TEMPLATES[category]}
    for split in SPLITS:
        used = {sample(2, index, world, split).phrasing.template for index in range(300)}
        assert used & kept == (kept if split in ("test", "heldout") else set())


def test_underspecified_captions_are_as_many_as_asked_for(world: World):
    made = [sample(8, index, world) for index in range(1000)]
    vague = np.mean([any(None in pair for pair in one.phrasing.wanted) for one in made])
    assert vague == pytest.approx(world.underspecified, abs=0.04)
    two = [one.phrasing.wanted for one in made if one.category in ("two", "relation")]
    colourless = np.mean([{colour for _, colour in wanted} == {None} for wanted in two])
    assert colourless == pytest.approx(world.underspecified * world.colourless, abs=0.04)


def test_mix_can_be_changed(world: World):
    alone = replace(world, mix=(("single", 1.0),))
    assert {len(sample(1, index, alone).scene.objects) for index in range(50)} == {1}


def test_an_unknown_split_is_refused():
    with pytest.raises(UsageError, match="Expected a split of train"):
        sample(0, 0, split="validation")
