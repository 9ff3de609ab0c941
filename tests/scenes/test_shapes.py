from itertools import combinations

import numpy as np
import pytest

from gobelin.scenes.shapes import SHAPES

AXIS = np.arange(-120, 121) / 100
INSIDE = {name: shape(AXIS[None, :], AXIS[:, None]) < 0 for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_lies_in_the_unit_disc_and_nearly_fills_it(name):
    reach = np.hypot(AXIS[None, :], AXIS[:, None])[INSIDE[name]].max()
    assert 0.85 < reach <= 1


@pytest.mark.parametrize("name", SHAPES)
def test_distance_grows_by_one_a_unit_at_the_edge(name):
    """So that an edge is one pixel soft at every radius."""
    distance = SHAPES[name](AXIS[None, :], AXIS[:, None])
    slope = np.hypot(*np.gradient(distance, AXIS[1] - AXIS[0]))[np.abs(distance) < 0.03]
    assert np.median(slope) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_is_the_same_from_left_and_right(name):
    np.testing.assert_array_equal(INSIDE[name], INSIDE[name][:, ::-1])


@pytest.mark.parametrize(("one", "other"), list(combinations(SHAPES, 2)))
def test_shapes_overlap_too_little_to_be_mistaken(one, other):
    a, b = INSIDE[one], INSIDE[other]
    assert (a & b).sum() / (a | b).sum() < 0.8


def test_triangle_and_star_point_up():
    for name in ("triangle", "star"):
        widths = INSIDE[name].sum(axis=1)
        rows = np.flatnonzero(widths)
        assert widths[rows[0]] <= 3
        assert widths[rows[-1]] > 3 or name == "star"
