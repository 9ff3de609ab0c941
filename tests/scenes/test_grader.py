from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from gobelin.errors import UsageError
from gobelin.scenes import CORE, RICH, Detection, Sample, Scene, SceneObject, World, grade, render, sample
from gobelin.scenes.colours import COLOURS, TONES
from gobelin.scenes.shapes import SHAPES
from gobelin.scenes.textures import TEXTURES


def looks(thing: SceneObject | Detection) -> tuple[str | None, ...]:
    return thing.shape, thing.colour, thing.texture, thing.size


def exact(made: Sample, image: np.ndarray) -> bool:
    """Whether the grader reads just what was drawn, on the background that it was drawn on."""
    seen = grade(image, made.world)
    grounds = {thing.background for thing in seen} <= {made.scene.background}
    return grounds and Counter(map(looks, made.scene.objects)) == Counter(map(looks, seen))


def pixels(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return pixels(ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0)))


def noisy(image: np.ndarray, sigma: float) -> np.ndarray:
    return pixels(image + 255 * sigma * np.random.default_rng(0).standard_normal(image.shape))


def test_true_renders_are_read_exactly(world: World, drawn):
    right, total = Counter(), Counter()
    for made in drawn(world, "test", 160) + drawn(world, "heldout", 60):
        right[made.category] += exact(made, made.image)
        total[made.category] += 1
    assert min(total.values()) > 20
    assert all(right[category] >= 0.995 * total[category] for category in total)


def test_masks_and_places_are_those_of_the_objects(world: World):
    for index in range(60):
        made = sample(22, index, world)
        for seen in grade(made.image, world):
            overlaps = (made.masks & seen.mask).sum(axis=(1, 2)) / (made.masks | seen.mask).sum(axis=(1, 2))
            thing = made.scene.objects[overlaps.argmax()]
            assert overlaps.max() > (0.9 if world.textures == ("solid",) else 0.85)
            assert (
                np.hypot(seen.x - thing.x, seen.y - thing.y) < 0.25 * thing.radius + 0.8
            )  # a triangle's disc is off its box
            left, top, right, bottom = seen.box
            assert seen.area == seen.mask.sum() == seen.mask[top:bottom, left:right].sum()
            assert (seen.width, seen.height) == (right - left, bottom - top)


@pytest.mark.parametrize(("spoil", "levels"), [(blurred, (0.5, 1.5, 2, 3)), (noisy, (0.02, 0.06, 0.08, 0.15))])
def test_scores_fall_steadily_as_images_get_worse(world: World, spoil, levels, drawn):
    made = drawn(world, "dev", 60)
    scores = [np.mean([exact(one, spoil(one.image, level)) for one in made]) for level in levels]
    assert scores[0] >= 0.98
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.6


def test_a_mild_blur_does_no_harm(world: World, drawn):
    sigma = 1 if world.textures == ("solid",) else 0.7
    assert np.mean([exact(one, blurred(one.image, sigma)) for one in drawn(world, "dev", 100)]) >= 0.98


def test_the_shape_must_stand_upright_and_have_its_proportions():
    square = SceneObject(shape="square", colour="red", x=32, y=32, radius=14)
    image, _ = render(Scene(objects=(square,), background="grey"))
    assert [seen.shape for seen in grade(image)] == ["square"]
    turned = ndimage.rotate(image.astype(float), 45, reshape=False, order=1, mode="nearest")
    assert [seen.shape for seen in grade(pixels(turned))] != ["square"]
    flat = image.copy()
    flat[:28] = flat[0, 0]
    flat[37:] = flat[0, 0]
    assert [seen.shape for seen in grade(flat)] == ["unknown"]


def test_a_blob_is_unknown():
    image = np.full((64, 64, 3), 176, np.uint8)
    image[10:40, 10:16] = image[34:40, 10:40] = (221, 32, 38)
    (seen,) = grade(image)
    assert (seen.shape, seen.colour) == ("unknown", "red")
    assert seen.iou < 0.75


@pytest.mark.parametrize("radius", [8, 11, 14])
def test_an_outline_may_stray_by_less_than_half_a_pixel(radius):
    """The waves leave the area between circle and blob at 4·amplitude·radius, over a length of 2π·radius."""
    rows, columns = np.mgrid[:64, :64] + 0.5 - 32
    angle, reach = np.arctan2(rows, columns), np.hypot(rows, columns)
    for amplitude, expected in ((0.4, "circle"), (1.6, "unknown")):
        image = np.full((64, 64, 3), 176, np.uint8)
        image[reach < radius + amplitude * np.cos(5 * angle)] = (221, 32, 38)
        (seen,) = grade(image)
        assert seen.shape == expected
        assert seen.stray == pytest.approx(2 / np.pi * amplitude, abs=0.25)


def test_the_colour_is_that_of_the_core():
    image = np.full((64, 64, 3), 176, np.uint8)
    image[20:26, 20:26] = (140, 36, 150)
    image[21:25, 21:25] = (221, 32, 38)
    assert [seen.colour for seen in grade(image)] == ["red"]


@pytest.mark.parametrize("blot", ["none", "a patch", "noise"])
def test_a_texture_must_follow_its_pattern(blot):
    thing = SceneObject(shape="square", colour="blue", x=32, y=32, radius=13, texture="striped", size="large")
    image, masks = render(Scene(objects=(thing,), background="rose"))
    assert [looks(seen) for seen in grade(image, RICH)] == [("square", "blue", "striped", "large")]
    tones = np.array([COLOURS["blue"], TONES["blue"]], np.uint8)
    if blot == "none":
        image[masks[0]] = tones[0]
    elif blot == "a patch":
        image[masks[0] & (np.arange(64) > 33)] = tones[0]
        image[masks[0] & (np.arange(64) <= 33)] = tones[1]
    else:
        image[masks[0]] = tones[np.random.default_rng(0).integers(2, size=masks.sum())]
    assert [seen.texture for seen in grade(image, RICH)] == ["solid" if blot == "none" else "unknown"]


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_size_and_texture_are_read_at_every_size_and_phase(shape, texture):
    for number in range(12):
        radius, size = ((8.0, "small"), (9.0, "small"), (11.5, "large"), (13.0, "large"))[number % 4]
        thing = SceneObject(
            shape=shape, colour=RICH.colours[number % 10], x=30 + 0.37 * number, y=33 - 0.29 * number, radius=radius,
            texture=texture, size=size,
        )  # fmt: skip
        image, _ = render(Scene(objects=(thing,), background=RICH.backgrounds[number % 6], gradient=(5, -5)))
        assert [looks(seen) for seen in grade(image, RICH)] == [looks(thing)]


def test_specks_are_no_objects_and_an_empty_image_has_none():
    image = np.full((64, 64, 3), 176, np.uint8)
    assert grade(image) == []
    image[10:14, 10:14] = 0
    assert grade(image) == []
    image[10:15, 10:15] = 0
    assert len(grade(image)) == 1


def test_an_object_at_the_border_does_not_become_the_background():
    image = np.full((64, 64, 3), 176, np.uint8)
    image[:24, :24] = (221, 32, 38)
    assert [(seen.shape, seen.colour) for seen in grade(image)] == [("square", "red")]


def test_images_may_be_pils_but_not_floats():
    made = sample(25, 0)
    (a, *_), (b, *_) = grade(made.image, CORE), grade(Image.fromarray(made.image), CORE)
    assert (a.shape, a.colour, a.box) == (b.shape, b.colour, b.box)
    for wrong in (made.image / 255, made.image[..., 0], made.image[..., :2]):
        with pytest.raises(UsageError, match="Expected a uint8 image"):
            grade(wrong)
