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
from gobelin.scenes import CORE, RICH, WORLDS, Sample, World, sample
from gobelin.scenes.captions import PLACES, TEST_TEMPLATES
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
@settings(max_examples=40, deadline=None)
def test_image_masks_and_scene_agree(seed, index, world, split):
    made = sample(seed, index, world, split)
    assert (made.image.shape, made.image.dtype) == ((world.size, world.size, 3), np.uint8)
    assert made.masks.shape == (len(made.scene.objects), world.size, world.size)
    assert len(made.scene.objects) <= world.max_objects
    assert made.masks.sum(axis=0).max() == 1
    assert not made.masks[:, [0, -1]].any()
    assert not made.masks[:, :, [0, -1]].any()
    for thing, mask in zip(made.scene.objects, made.masks, strict=True):
        if made.category == "inside":
            bounds = world.radius_ring if thing is made.scene.objects[1] else world.radius_inside
        else:
            bounds = {"single": world.radius, "count": world.radius_count}.get(made.category, world.radius_crowded)
            bounds = dict(world.sizes).get(thing.size, bounds)
        assert bounds[0] <= thing.radius <= bounds[1]
        assert thing.size == world.size_of(thing.radius)
        assert thing.texture in world.textures
        rows, columns = np.nonzero(mask)
        assert np.hypot(rows + 0.5 - thing.y, columns + 0.5 - thing.x).max() <= thing.radius
    for one, other in combinations(made.masks, 2):
        assert ndimage.distance_transform_edt(~one)[other].min() >= 3
    assert np.hypot(*made.scene.gradient) <= world.gradient


@given(**ANY)
@settings(max_examples=40, deadline=None)
def test_words_are_those_of_the_caption_and_know_their_objects(seed, index, world, split):
    made = sample(seed, index, world, split)
    assert [word for word, _ in made.words] == re.findall(r"\w+", made.caption)
    for word, indices in made.words:
        things = [made.scene.objects[at] for at in indices]
        if word in world.colours:
            assert {thing.colour for thing in things} == {word}
        elif word in world.textures:
            assert {thing.texture for thing in things} == {word}
        elif word in ("small", "large"):
            assert {thing.size for thing in things} == {word}
        elif word in ("inside", "around", "within", "surrounding", "enclosing", "middle"):
            assert indices == (0, 1)
        elif word in (*world.backgrounds, "background"):
            assert indices == ()
            assert word in (made.scene.background, "background")
        elif word in world.shapes:
            assert [thing.shape for thing in things] == [word]
        elif word in ("stars", "circles", "things") and made.category == "count":
            assert indices == tuple(range(len(made.scene.objects)))
        elif word in ("two", "three", "four", "2", "3", "4") and made.category == "count":
            assert indices == tuple(range({"two": 2, "three": 3, "four": 4}.get(word) or int(word)))
        elif word in ("left", "right", "above", "below", "under", "over", "higher", "lower"):
            assert indices == (0, 1) if made.category == "relation" else len(indices) == 1
        elif word in ("a", "an", "the", "and", "there", "image"):
            assert indices == ()


@given(**ANY)
@settings(max_examples=40, deadline=None)
def test_captions_are_true(seed, index, world, split, read):
    made = sample(seed, index, world, split)
    objects, relation, count = read(made.caption)
    assert len(objects) == len(made.scene.objects)
    assert (relation is None) == (made.scene.relation is None)
    assert (count is None) == (made.category != "count")
    assert found_in(objects, relation, made.scene.objects, count=count)
    if made.scene.relation:
        assert relations(*made.scene.objects) == {made.scene.relation}


@pytest.mark.parametrize(("split", "count"), [("train", 800), ("dev", 400), ("test", 500)])
def test_held_out_combinations_are_absent_and_all_else_occurs(world: World, split, count, drawn):
    objects, colours, shapes, shown, counted, mix = (Counter() for _ in range(6))
    for made in drawn(world, split, count):
        things = made.scene.objects
        mix[made.scene.relation or made.category] += 1
        if made.category == "count":
            counted.update((len(things), thing.shape) for thing in things[:1])
        objects.update((thing.shape, thing.colour) for thing in things)
        shapes.update({thing.shape for thing in things})
        colours.update({thing.colour for thing in things})
        if len(things) == 2:
            a, b = things
            shown.update((a.shape, relation, b.shape) for relation in relations(a, b))
            shown.update((b.shape, relation, a.shape) for relation in relations(b, a))
        assert not world.holds_out(made.phrasing.wanted, *([made.phrasing.relation] if made.phrasing.relation else []))
    assert not world.held_out_pairs & set(objects)
    assert not world.held_out_relations & set(shown)
    assert not world.held_out_counts & set(counted)
    assert len(objects) == len(world.shapes) * len(world.colours) - len(world.held_out_pairs)
    assert all(colours[colour] > 0.6 * colours.total() / len(world.colours) for colour in world.colours)
    assert all(shapes[shape] > 0.6 * shapes.total() / len(world.shapes) for shape in world.shapes)
    weights = dict(world.mix)
    for category in set(world.categories) - {"relation"}:
        assert mix[category] / count == pytest.approx(weights[category], abs=0.05)
    if "count" in world.categories:
        assert set(counted) == set(product(COUNTS, world.shapes)) - world.held_out_counts
    assert all(mix[relation] / count > 0.15 * weights["relation"] for relation in RELATIONS)
    for relation in RELATIONS:
        assert {a for a, r, _ in shown if r == relation} == set(world.shapes)


def test_heldout_scenes_have_a_held_out_combination(world: World, drawn):
    kinds = Counter()
    for made in drawn(world, "heldout", 120):
        things = made.scene.objects
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


def test_only_test_splits_use_test_templates(world: World, drawn):
    kept = {template for category in world.categories for template in TEST_TEMPLATES[category]}
    for split in SPLITS:
        used = {made.phrasing.template for made in drawn(world, split, 600 if split == "test" else 100)}
        assert bool(used & kept) == (split in ("test", "heldout"))
        assert split != "test" or kept <= used


def test_underspecified_captions_are_as_many_as_asked_for(world: World, drawn):
    made = drawn(world, "train", 800)
    vague = np.mean([any(None in wanted[:2] for wanted in one.phrasing.wanted) for one in made])
    assert vague == pytest.approx(world.underspecified, abs=0.04)
    two = [one.phrasing.wanted for one in made if one.category in ("two", "relation")]
    colourless = np.mean([{one[1] for one in wanted} == {None} for wanted in two])
    assert colourless == pytest.approx(world.underspecified * world.colourless, abs=0.04)


def test_mix_can_be_changed(world: World):
    alone = replace(world, mix=(("single", 1.0),))
    assert {len(sample(1, index, alone).scene.objects) for index in range(50)} == {1}


def test_what_is_inside_a_ring_is_in_its_hole():
    for index in range(100):
        inner, ring = sample(3, index, replace(RICH, mix=(("inside", 1.0),))).scene.objects
        assert ring.shape == "ring" != inner.shape
        assert np.hypot(inner.x - ring.x, inner.y - ring.y) + inner.radius <= 0.51 * ring.radius - 2.98


def test_rich_captions_say_what_is_rich(drawn):
    made = drawn(RICH, "train", 600)
    said = [
        (thing, wanted) for one in made for thing, wanted in zip(one.scene.objects, one.phrasing.wanted, strict=False)
    ]
    textures = {texture: [thing for thing, _ in said if thing.texture == texture] for texture in RICH.textures}
    assert min(map(len, textures.values())) > 200
    backgrounds = Counter(one.scene.background for one in made)
    assert min(backgrounds[name] for name in RICH.backgrounds) > 60
    assert np.mean([one.phrasing.background is not None for one in made]) == pytest.approx(RICH.grounded, abs=0.07)
    alone = [one for one in made if one.category in ("single", "count")]
    for one in alone:
        (thing, *_), (wanted, *_) = one.scene.objects, one.phrasing.wanted
        assert thing.texture == "solid" or wanted[2] == thing.texture
    sizes = [one.phrasing.wanted[0][3:] not in ((), (None,)) for one in alone]
    assert 0.3 < np.mean(sizes) < 0.75


def test_captions_say_where_in_the_picture_an_object_is():
    sides = {wording: side for side, wordings in PLACES.items() for wording in wordings}
    placed = 0
    for index in range(600):
        one = sample(3, index, replace(CORE, mix=(("single", 1.0), ("two", 1.0))))
        for mention in one.phrasing.mentions:
            if mention.place:
                placed += 1
                thing = one.scene.objects[mention.things[0]]
                x, y = thing.x / one.scene.size - 0.5, thing.y / one.scene.size - 0.5
                truth = {"left": -x, "right": x, "top": -y, "bottom": y}
                assert max(truth, key=truth.__getitem__) == sides[mention.place]
                assert mention.place in one.caption
                named = {word for word, things in one.words if things == mention.things}
                assert named & {"left", "right", "top", "bottom", "upper", "lower"}
    assert 200 < placed < 450
    elsewhere = [sample(3, index, replace(CORE, mix=(("relation", 1.0), ("count", 1.0)))) for index in range(100)]
    assert not any(mention.place for one in elsewhere for mention in one.phrasing.mentions)


def test_two_objects_are_named_as_one_reads(world: World):
    pairs = replace(world, mix=(("two", 1.0),))
    for index in range(60):
        one = sample(5, index, pairs)
        first, second = (one.scene.objects[mention.things[0]] for mention in one.phrasing.mentions)
        across, down = second.x - first.x, second.y - first.y
        assert across >= 0 if abs(across) > abs(down) else down >= 0


def test_an_unknown_split_is_refused():
    with pytest.raises(UsageError, match="Expected a split of train"):
        sample(0, 0, split="validation")
