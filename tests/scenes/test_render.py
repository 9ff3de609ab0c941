import numpy as np
import pytest

from gobelin.scenes import Scene, SceneObject, render
from gobelin.scenes.colours import BACKGROUNDS, COLOURS, TONES
from gobelin.scenes.shapes import SHAPES


def one(shape: str, radius: float = 12, x: float = 30.3, y: float = 33.8) -> Scene:
    thing = SceneObject(shape=shape, colour="blue", x=x, y=y, radius=radius)
    return Scene(objects=(thing,), background="grey")


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_is_where_the_colour_is(shape):
    image, masks = render(one(shape))
    assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
    assert (masks.shape, masks.dtype) == ((1, 64, 64), np.bool_)
    blue, grey = np.array(COLOURS["blue"]), np.array(BACKGROUNDS["grey"])
    cover = ((image - grey) @ (blue - grey)) / ((blue - grey) @ (blue - grey))
    np.testing.assert_array_equal(masks[0][np.abs(cover - 0.5) > 0.01], (cover > 0.5)[np.abs(cover - 0.5) > 0.01])
    assert cover.sum() == pytest.approx(masks[0].sum(), rel=0.06)


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_smooth(shape):
    """A shift of a fraction of a pixel changes the image, by little."""
    still, moved = (render(one(shape, x=x))[0].astype(int) for x in (30.3, 30.5))
    assert 0 < np.abs(still - moved).max() < 80


@pytest.mark.parametrize(("texture", "share"), [("striped", 2 / 5), ("dotted", np.pi * 1.35**2 / 25)])
def test_a_texture_is_so_much_of_the_second_tone(texture, share):
    thing = SceneObject(shape="square", colour="blue", x=30, y=33, radius=21.43, texture=texture)  # 30 px wide
    image, masks = render(Scene(objects=(thing,), background="grey"))
    first, second = np.array(COLOURS["blue"]), np.array(TONES["blue"])
    found = (image[masks[0]] - first) @ (second - first) / ((second - first) @ (second - first))
    assert found.mean() == pytest.approx(share, abs=0.02)
    np.testing.assert_array_equal(masks, render(one("square", 21.43, 30, 33))[1])
    rows = image[masks[0]].reshape(30, 30, 3).std(axis=1).max()
    assert (rows == 0) == (texture == "striped")


def test_the_background_gets_brighter_by_the_gradient():
    scene = Scene(objects=(), background="grey", gradient=(6.0, -3.0))
    image = render(scene)[0].astype(float) - BACKGROUNDS["grey"]
    assert image[32, 0].mean() == pytest.approx(-6, abs=0.6)
    assert image[32, -1].mean() == pytest.approx(6, abs=0.6)
    assert image[0, 32].mean() == pytest.approx(3, abs=0.6)
    assert abs(image.mean()) < 0.1


def test_a_whole_shift_moves_the_pixels():
    left, right = (render(one("star", x=x))[0] for x in (30.25, 35.25))
    np.testing.assert_array_equal(left[:, :-5], right[:, 5:])


def test_noise_has_the_sigma_asked_for():
    image, _ = render(one("circle"), noise=0.02, rng=np.random.default_rng(1))
    assert (image[:15].astype(float) - BACKGROUNDS["grey"]).std() == pytest.approx(0.02 * 255, rel=0.1)
    np.testing.assert_array_equal(render(one("circle"), noise=0.02)[0], render(one("circle"), noise=0.02)[0])


def test_size_and_background():
    image, masks = render(Scene(objects=(), background="sand", size=32))
    assert masks.shape == (0, 32, 32)
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(BACKGROUNDS["sand"]), (32, 32, 3)))
