import numpy as np
import pytest

from gobelin.scenes import World
from gobelin.scenes.colours import BACKGROUNDS, COLOURS, difference, lab


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((119, 119, 119), (50.03, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
    ],
)
def test_lab_of_known_colours(rgb, expected):
    np.testing.assert_allclose(lab([rgb])[0], expected, atol=0.02)


def test_backgrounds_are_far_from_every_object_colour(world: World):
    grounds = lab([BACKGROUNDS[name] for name in world.backgrounds])
    objects = lab([COLOURS[name] for name in world.colours])
    assert difference(grounds[:, None], objects).min() >= 25


def test_colours_are_far_from_each_other(world: World):
    objects = lab([COLOURS[name] for name in world.colours])
    apart = difference(objects[:, None], objects) + 1000 * np.eye(len(objects))
    assert apart.min() >= 40
