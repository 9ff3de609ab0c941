import numpy as np
import pytest

from gobelin.scenes.textures import TEXTURE_PERIOD, TEXTURES

AT = np.linspace(-10, 10, 401)


@pytest.mark.parametrize("name", TEXTURES)
def test_a_texture_repeats_and_is_a_share(name):
    share = TEXTURES[name](AT[None, :], AT[:, None])
    assert share.shape == (401, 401)
    assert 0 <= share.min() <= share.max() <= 1
    moved = TEXTURES[name](AT[None, :] + TEXTURE_PERIOD, AT[:, None] - 2 * TEXTURE_PERIOD)
    np.testing.assert_allclose(share, moved, atol=1e-9)
    assert share.mean() < 0.5


def test_stripes_run_across_and_dots_stand_apart():
    striped, dotted = (TEXTURES[name](AT[None, :], AT[:, None]) for name in ("striped", "dotted"))
    assert np.ptp(striped, axis=1).max() == 0
    assert striped.std(axis=0).min() > 0.3
    np.testing.assert_allclose(dotted, dotted.T)
    assert (dotted.max(axis=1) == 0).mean() > 0.2
