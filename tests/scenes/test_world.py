from collections import Counter
from dataclasses import replace

import pytest

from gobelin.errors import UsageError
from gobelin.scenes import NANO, World
from gobelin.scenes.relations import INVERSE, RELATIONS


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
    assert {relation for _, relation, _ in triples} == set(RELATIONS)
    assert set(Counter(first for first, _, _ in triples).values()) == {2}
    assert all((b, INVERSE[relation], a) in triples for a, relation, b in triples)


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
    ],
)
def test_a_world_that_cannot_be_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        replace(NANO, **change)


def test_max_objects():
    assert NANO.max_objects == 2
    assert replace(NANO, mix=(("single", 1.0),)).max_objects == 1
