"""The colour map is even to the eye, and what it is laid over stays visible."""

import numpy as np
import torch
from PIL import Image

from gobelin.look.colour_map import colour_map, colour_values, overlay_values
from gobelin.scenes.colours import rgb_to_lab


def test_lightness_rises_in_even_steps() -> None:
    lightness = rgb_to_lab(colour_map())[:, 0]
    steps = np.diff(lightness[::16])
    assert steps.min() > 0
    assert steps.max() < 2 * steps.mean()
    assert lightness[0] < 12
    assert lightness[-1] > 90


def test_values_become_colours() -> None:
    picture = colour_values(torch.tensor([[0.0, 1.0, 2.0]]))
    assert [picture.getpixel((x, 0)) for x in range(3)] == [tuple(colour_map()[i].tolist()) for i in (0, 255, 255)]


def test_where_values_are_low_the_picture_is_seen_in_grey() -> None:
    picture = Image.new("RGB", (8, 6), (200, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 4, 6))
    low = np.asarray(overlay_values(picture, torch.zeros(3, 4))).astype(int)
    assert low[3, 1].mean() > low[3, 6].mean() + 50
    high = np.asarray(overlay_values(picture, torch.ones(3, 4)))
    assert np.ptp(high.reshape(-1, 3), axis=0).max() <= 1
    assert overlay_values(picture, torch.ones(3, 4), 40).size == (40, 30)
