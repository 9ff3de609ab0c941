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
