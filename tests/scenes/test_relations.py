from dataclasses import replace

import pytest

from gobelin.scenes import SceneObject
from gobelin.scenes.relations import INVERSE, answers, found_in, relations


def at(x: float, y: float, shape: str = "circle", colour: str = "red") -> SceneObject:
    return SceneObject(shape=shape, colour=colour, x=x, y=y, radius=8)


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-20, 0, {"left of"}),
        (20, 3, {"right of"}),
        (0, -20, {"above"}),
        (-3, 20, {"below"}),
        (-20, -20, {"left of", "above"}),
        (0, 0, set()),
        (6, 0, set()),  # 6 - 0.1 * 32 < 0.5 * 6
        (7, 0, {"right of"}),  # 7 - 0.1 * 32 > 0.5 * 7
    ],
)
def test_relations_follow_genevals_rule(dx, dy, expected):
    a, b = at(32 + dx, 32 + dy), at(32, 32)
    assert relations(a, b) == expected
    assert relations(b, a) == {INVERSE[relation] for relation in expected}


def test_what_lies_in_anothers_box_is_inside():
    small, large = at(32, 30), SceneObject(shape="ring", colour="red", x=32, y=32, radius=20)
    assert relations(small, large) == {"inside"}
    assert relations(large, small) == {"around"}
    assert relations(at(44.5, 32), large) == {"right of"}  # it reaches beyond the ring
    assert relations(small, small) == set()
    assert found_in([("circle", None), ("ring", None)], "inside", [large, small])
    assert not found_in([("circle", None), ("ring", None)], "around", [large, small])


def test_texture_and_size_count_where_they_are_asked_for():
    thing = replace(at(20, 20), texture="striped", size="small")
    assert answers(("circle", "red"), thing)
    assert answers(("circle", None, "striped", "small"), thing)
    assert answers((None, None, None, "small"), thing)
    assert not answers(("circle", "red", "dotted", None), thing)
    assert not answers(("circle", "red", None, "large"), thing)


def test_found_in_needs_a_thing_for_each_object():
    things = [at(16, 32), at(48, 32, "square", "blue")]
    assert found_in([("circle", "red"), ("square", "blue")], "left of", things)
    assert found_in([("square", None), (None, "red")], "right of", things)
    assert not found_in([("circle", "red"), ("square", "blue")], "right of", things)
    assert not found_in([("circle", "red"), ("circle", "red")], None, things)
    assert not found_in([("circle", "blue"), ("square", "red")], None, things)
    assert not found_in([("circle", "red")], None, [])


def test_a_number_is_exact():
    things = [at(10 * n, 32) for n in range(3)] + [at(48, 60, "square", "red")]
    assert found_in([("circle", "red")] * 3, None, things, count=3)
    assert found_in([(None, "red")] * 4, None, things, count=4)
    assert found_in([("circle", "red")] * 2, None, things)
    assert not found_in([("circle", "red")] * 2, None, things, count=2)
    assert not found_in([("circle", "red")] * 4, None, things, count=4)


def test_a_crowd_is_looked_through_in_no_time():
    crowd = [at(n, n) for n in range(40)]
    assert found_in([("circle", "red")] * 5, None, crowd)
    assert not found_in([("circle", "red")] * 5, None, crowd, count=5)
    assert not found_in([("circle", "red")] * 4 + [("circle", "blue")], None, crowd)
