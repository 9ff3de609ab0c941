import pytest

from gobelin.scenes import SceneObject
from gobelin.scenes.relations import INVERSE, found_in, relations


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
