"""Buckets and preprocessing: sizes by the rule, the bucket that loses least, pixels where they belong."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gobelin import scenes
from gobelin.data.buckets import Preprocessing, bucket_sizes, decode, upright_size
from gobelin.errors import DataError, UsageError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_buckets_of_512_are_those_of_sd_scripts() -> None:
    """By sd-scripts' rule, for each width the greatest height of no more pixels, where sides differ twofold at most."""
    assert bucket_sizes(512) == ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))


@given(size=st.integers(4, 66).map(lambda number: 16 * number), aspect=st.sampled_from([1.0, 1.5, 2.0, 4.0]))
def test_buckets_keep_the_area_the_aspect_and_the_step(size: int, aspect: float) -> None:
    sizes = bucket_sizes(size, 16 if size % 64 else None, aspect)
    assert (size, size) in sizes
    assert len(set(sizes)) == len(sizes)
    assert {(width, height) for height, width in sizes} == set(sizes), "for each tall one a wide one"
    ratios = [width / height for height, width in sizes]
    assert ratios == sorted(ratios)
    for height, width in sizes:
        assert height * width <= size * size
        assert max(height, width) <= aspect * min(height, width)
        assert height % 16 == width % 16 == 0


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20))
def test_each_image_goes_where_least_is_cropped(sides: list[tuple[int, int]]) -> None:
    preprocessing = Preprocessing(size=256, buckets=True)
    widths, heights = np.array(sides).T
    losses = preprocessing.losses(widths, heights)
    for (width, height), loss in zip(sides, losses, strict=True):
        every = [width / height * to_height / to_width for to_height, to_width in preprocessing.sizes]
        assert loss == pytest.approx(min(1 - min(ratio, 1 / ratio) for ratio in every))


def test_scales_say_what_is_enlarged() -> None:
    widths, heights = np.array([64, 32, 128, 256]), np.array([64, 64, 64, 16])
    assert Preprocessing(size=64).scales(widths, heights).tolist() == [1, 2, 1, 4]
    assert Preprocessing(size=64, fit="pad").scales(widths, heights).tolist() == [1, 1, 0.5, 0.25]
    assert Preprocessing(size=64).losses(widths, heights).tolist() == [0, 0.5, 0.5, 1 - 1 / 16]
    assert not Preprocessing(size=64, fit="pad").losses(widths, heights).any()


def test_an_image_is_cropped_to_the_centre_or_padded() -> None:
    image = Image.new("RGB", (120, 40), "red")
    image.paste("blue", (40, 0, 80, 40))
    content = encoded(image)
    assert (Preprocessing(size=40).read(content, "a") == (0, 0, 255)).all()
    padded = Preprocessing(size=120, fit="pad", background="#00ff00").read(content, "a")
    assert (padded[:38] == (0, 255, 0)).all()
    assert (padded[42:78, 45:75] == (0, 0, 255)).all()
    assert (padded[42:78, :35] == (255, 0, 0)).all()
    assert (padded[82:] == (0, 255, 0)).all()


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("sides", [(64, 64), (30, 100), (640, 80), (1, 1), (1, 500)])
def test_every_image_has_the_size_of_its_bucket(fit: str, sides: tuple[int, int]) -> None:
    preprocessing = Preprocessing(size=64, buckets=True, fit=fit)
    image = preprocessing.read(encoded(Image.new("RGB", sides)), "a")
    assert image.shape[:2] == preprocessing.sizes[preprocessing.assign([sides[0]], [sides[1]])[0]]


def turned(size: tuple[int, int], orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", size, "white")
    image.paste("red", (0, 0, size[0] // 2, size[1]))  # the left half
    return encoded(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_decides_the_bucket_and_turns_the_image(kind: str) -> None:
    content = turned((1600, 800), 6, kind)  # a quarter turn to the right: the left half is on top
    assert upright_size(content, "a") == (800, 1600)
    preprocessing = Preprocessing(size=64, buckets=True)
    image = preprocessing.read(content, "a")
    assert image.shape == (80, 48, 3)
    assert image[5, 24, 1] < 20
    assert image[-5, 24, 1] > 235


def test_transparency_shows_the_background() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    grey_alpha = Image.new("LA", (8, 8), (0, 0))
    palette = Image.new("P", (8, 8), 0)
    for image, options in ((clear, {}), (grey_alpha, {}), (palette, {"transparency": 0})):
        content = encoded(image, **options)
        assert (Preprocessing(size=8).read(content, "a") == 255).all()
        assert (Preprocessing(size=8, background="blue").read(content, "a") == (0, 0, 255)).all()
    half = encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128)))
    assert abs(Preprocessing(size=8, background="black").read(half, "a")[0, 0].astype(int) - (128, 0, 0)).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "CMYK", "RGB", "RGBA"])
def test_a_background_changes_nothing_opaque(mode: str) -> None:
    image = Image.linear_gradient("L").resize((16, 16))
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    options = {"transparency": 1} if mode == "I;16" else {}  # a level that no pixel has
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG", **options)
    plain, blue = (Preprocessing(size=8, background=colour).read(content, "a") for colour in ("white", "blue"))
    assert (plain == blue).all()
    assert plain.min() < 40
    assert plain.max() > 215


@pytest.mark.parametrize("side", [160, 161, 320, 640, 1000])
def test_a_large_jpeg_is_decoded_small(side: int) -> None:
    """From 160 on at half of its size or less, and a quarter above the target at least; detail is what it was."""
    drawn = scenes.sample(1, 3, scenes.CORE, "train").image
    image = Image.fromarray(drawn).resize((side, side), Image.Resampling.BICUBIC)
    content = encoded(image, "JPEG", quality=95)
    small = decode(content, "a", at_least=(64, 64))
    assert 80 <= min(small.size) <= max(side // 2 + 1, 80)
    whole = Preprocessing(size=64).read(encoded(decode(content, "a"), "PNG", compress_level=1), "a")
    error = Preprocessing(size=64).read(content, "a").astype(float) - whole
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 42  # odd sides are halved to 80.5 pixels, and so shifted


def test_what_is_no_image_is_said() -> None:
    with pytest.raises(DataError, match="a cannot be read as an image"):
        Preprocessing(size=8).read(b"no image", "a")
    with pytest.raises(DataError, match=r"a has 9000×8000 pixels: give 64 million pixels at most"):
        decode(encoded(Image.new("1", (9000, 8000))), "a")
    whole = encoded(Image.effect_noise((300, 300), 90), "JPEG")
    with pytest.raises(DataError, match="truncated"):
        decode(whole[: len(whole) // 2], "a", at_least=(8, 8))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"background": "reddish"}, "background is 'reddish': give an opaque colour"),
        ({"background": "#ff000080"}, "give an opaque colour"),
        ({"size": 60, "buckets": True}, "buckets of 60 pixels have sides in multiples of 16"),
        ({"size": 0}, "size is 0"),
        ({"max_aspect": 0.5}, "max_aspect is 0.5: give 1 or more"),
        ({"size": 8192, "step": 16, "max_aspect": 100.0, "buckets": True}, "buckets: give a longer step"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Preprocessing(**options)


def test_the_key_says_what_changes_pixels() -> None:
    keys = [
        Preprocessing(**options).key
        for options in ({}, {"size": 128}, {"buckets": True}, {"fit": "pad"}, {"background": "blue"})
    ]
    assert len(set(keys)) == len(keys)
    assert Preprocessing(background="#ffffff").key == keys[0]
