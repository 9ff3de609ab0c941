from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from gobelin.errors import UsageError
from gobelin.scenes import CORE, NANO, RICH, World
from gobelin.scenes.relations import INVERSE, RELATIONS
from gobelin.scenes.world import COUNTS


def test_held_out_pairs_are_a_seventh_spread_evenly(world: World):
    pairs = world.held_out_pairs
    assert 0.12 < len(pairs) / (len(world.shapes) * len(world.colours)) <= 0.15
    by_shape = Counter(shape for shape, _ in pairs)
    by_colour = Counter(colour for _, colour in pairs)
    assert max(by_shape.values()) <= 2
    assert max(by_colour.values()) == 1
    assert set(by_shape) <= set(world.shapes)
    assert set(by_colour) <= set(world.colours)


def test_held_out_relations_are_few_and_spread_evenly(world: World):
    triples = world.held_out_relations
    assert 0.05 < len(triples) / (4 * len(world.shapes) ** 2) < 0.15
    inside = {triple for triple in triples if triple[1] in ("inside", "around")}
    assert inside == ({("star", "inside", "ring"), ("ring", "around", "star")} if world is RICH else set())
    assert {relation for _, relation, _ in triples - inside} == set(RELATIONS)
    assert set(Counter(first for first, _, _ in triples - inside).values()) == {2}
    assert all((b, INVERSE[relation], a) in triples for a, relation, b in triples)


def test_held_out_counts_are_few_and_leave_every_number_and_shape():
    counts = CORE.held_out_counts
    assert 0.1 < len(counts) / (len(COUNTS) * len(CORE.shapes)) <= 0.15
    kept = set(product(COUNTS, CORE.shapes)) - counts
    assert {count for count, _ in kept} == set(COUNTS)
    assert {shape for _, shape in kept} == set(CORE.shapes)
    assert max(Counter(shape for _, shape in counts).values()) == 1
    assert not NANO.held_out_counts


def test_so_many_of_a_shape_are_held_out_whatever_their_colours():
    two = next(shape for count, shape in CORE.held_out_counts if count == 2)
    assert CORE.holds_out([(two, None), (two, None)])
    free = [(two, colour) for colour in CORE.colours if (two, colour) not in CORE.held_out_pairs][:2]
    assert CORE.holds_out(free)
    assert not CORE.holds_out(free[:1])
    assert not replace(CORE, mix=(("two", 1.0),)).holds_out(free)
    assert not CORE.holds_out([(two, None)])
    assert not CORE.holds_out([(None, None), (None, None)])


def test_more_objects_than_ever_occur_are_held_out(world: World):
    most = [(None, None)] * world.max_objects
    assert not world.holds_out(most)
    assert world.holds_out([*most, (None, None)])


def test_holds_out(world: World):
    shape, colour = min(world.held_out_pairs)
    a, relation, b = min(world.held_out_relations)
    assert world.holds_out([(shape, colour)])
    assert not world.holds_out([(shape, None)])
    assert world.holds_out([(a, None), (b, None)], relation)
    assert not world.holds_out([(a, None), (b, None)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ("circle", "blob")}, "Expected shapes of"),
        ({"colours": ()}, "got none"),
        ({"backgrounds": ("plaid",)}, "Expected backgrounds of"),
        ({"mix": (("crowd", 1.0),)}, "Expected categories of"),
        ({"shapes": ("circle",)}, "7 pairs"),
        ({"radius": (8.0, 32.0)}, "fit into 62 px"),
        ({"radius_crowded": (8.0, 15.0)}, "fit into 62 px"),
        ({"radius_count": (8.0, 15.0)}, "fit into 62 px"),
    ],
)
def test_a_world_that_cannot_be_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        replace(NANO, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"textures": ("solid", "furry")}, "Expected textures of solid, striped, dotted"),
        ({"sizes": (("small", (8.0, 15.0)),)}, "fit into 62 px"),
        ({"shapes": ("circle", "square")}, "Expected rings"),
        ({"radius_ring": (24.0, 32.0)}, "Expected rings that fit"),
        ({"radius_inside": (8.0, 10.0)}, "9.24 px or less inside"),
    ],
)
def test_a_rich_world_that_cannot_be_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        replace(RICH, **change)


def test_the_word_for_a_size_is_the_nearest():
    assert [RICH.size_of(radius) for radius in (6, 8.5, 10, 10.5, 12, 28)] == [*["small"] * 3, *["large"] * 3]
    assert CORE.size_of(8.5) is None


def test_max_objects():
    assert CORE.max_objects == 4
    assert RICH.max_objects == 4
    assert NANO.max_objects == 2
    assert replace(NANO, mix=(("single", 1.0),)).max_objects == 1
