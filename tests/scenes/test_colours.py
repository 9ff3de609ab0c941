import numpy as np
import pytest

from gobelin.scenes import RICH, World
from gobelin.scenes.colours import BACKGROUNDS, COLOURS, TONES, difference, lab


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


def test_the_second_tones_are_far_from_the_first_and_from_every_background():
    """And so is every mixture of the two, which is what an edge between them looks like."""
    grounds = lab([BACKGROUNDS[name] for name in RICH.backgrounds])
    for colour in RICH.colours:
        first, second = np.array(COLOURS[colour]), np.array(TONES[colour])
        assert difference(lab([COLOURS[colour]]), lab([TONES[colour]]))[0] >= 24
        mixed = lab((first + np.linspace(0, 1, 21)[:, None] * (second - first)).astype(np.uint8))
        assert difference(grounds[:, None], mixed).min() >= 22


def test_backgrounds_are_told_apart():
    grounds = lab([BACKGROUNDS[name] for name in RICH.backgrounds])
    assert (difference(grounds[:, None], grounds) + 1000 * np.eye(len(grounds))).min() >= 12


def test_colours_are_far_from_each_other(world: World):
    objects = lab([COLOURS[name] for name in world.colours])
    apart = difference(objects[:, None], objects) + 1000 * np.eye(len(objects))
    assert apart.min() >= 40
