import numpy as np
import pytest

from gobelin.scenes import RICH, World
from gobelin.scenes.colours import BACKGROUNDS, COLOURS, TONES, colour_distance, rgb_to_lab


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
    np.testing.assert_allclose(rgb_to_lab([rgb])[0], expected, atol=0.02)


def test_backgrounds_are_far_from_every_object_colour(world: World):
    grounds = rgb_to_lab([BACKGROUNDS[name] for name in world.backgrounds])
    objects = rgb_to_lab([COLOURS[name] for name in world.colours])
    assert colour_distance(grounds[:, None], objects).min() >= 25


def test_the_second_tones_are_far_from_the_first_and_from_every_background():
    """And so is every mixture of the two, which is what an edge between them looks like."""
    grounds = rgb_to_lab([BACKGROUNDS[name] for name in RICH.backgrounds])
    for colour in RICH.colours:
        first, second = np.array(COLOURS[colour]), np.array(TONES[colour])
        assert colour_distance(rgb_to_lab([COLOURS[colour]]), rgb_to_lab([TONES[colour]]))[0] >= 24
        mixed = rgb_to_lab((first + np.linspace(0, 1, 21)[:, None] * (second - first)).astype(np.uint8))
        assert colour_distance(grounds[:, None], mixed).min() >= 22


def test_backgrounds_are_told_apart():
    grounds = rgb_to_lab([BACKGROUNDS[name] for name in RICH.backgrounds])
    assert (colour_distance(grounds[:, None], grounds) + 1000 * np.eye(len(grounds))).min() >= 12


def test_colours_are_far_from_each_other(world: World):
    objects = rgb_to_lab([COLOURS[name] for name in world.colours])
    apart = colour_distance(objects[:, None], objects) + 1000 * np.eye(len(objects))
    assert apart.min() >= 40
