"""Images as people have them: every mode, orientation, transparency and range is read as a viewer shows it."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from tests.conftest import sentence_of

from gobelin import images
from gobelin.errors import DataError, UsageError
from gobelin.images import (
    data_url,
    images_to_tensor,
    open_image,
    open_mask,
    png_bytes,
    tensor_to_images,
)
from gobelin.inpainting import InitImage

RED, GREEN, WHITE, GREY = (255, 0, 0), (0, 128, 0), (255, 255, 255), (78, 78, 78)


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def corner(image: Image.Image) -> tuple[int, ...]:
    found = image.getpixel((0, 0))
    return found if isinstance(found, tuple) else (int(found),)


@pytest.fixture
def photo() -> Image.Image:
    """6×4, each pixel another colour."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_images_are_turned_as_their_exif_says(photo: Image.Image, orientation: int, kind: str, tmp_path: Path) -> None:
    turns = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_270],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_90],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"photo.{kind}"
    photo.save(file, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    with Image.open(file) as stored:
        expected = stored.convert("RGB")
    for turn in turns[orientation]:
        expected = expected.transpose(turn)
    assert np.array_equal(levels(open_image(file)), levels(expected))
    assert open_mask(file).size == expected.size
    with Image.open(file) as opened:
        assert open_image(opened).size == expected.size, "a PIL image that was opened has its EXIF too"


def transparent(mode: str) -> Image.Image:
    """Left: hidden green, right: opaque red; 2×1 pixels."""
    if mode in ("RGBA", "RGBa"):
        image = Image.new("RGBA", (2, 1), (*GREEN, 0))
        image.putpixel((1, 0), (*RED, 255))
        return image if mode == "RGBA" else image.convert("RGBa")
    if mode in ("LA", "La"):
        image = Image.new("LA", (2, 1), (90, 0))
        image.putpixel((1, 0), (40, 255))
        return image if mode == "LA" else image.convert("La")
    if mode == "PA":
        return transparent("P").convert("PA")
    image = Image.new("P", (2, 1))
    image.putpalette([*GREEN, *RED])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0 if mode == "P" else bytes([0, 255])
    return image


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "P", "P with alphas", "PA"])
def test_what_is_transparent_lies_on_white(mode: str, tmp_path: Path) -> None:
    image = transparent(mode)
    found = open_image(image)
    assert found.mode == "RGB"
    assert corner(found) == WHITE
    assert found.getpixel((1, 0)) == ((40, 40, 40) if mode in ("LA", "La") else RED)
    if mode not in ("PA", "RGBa", "La"):
        image.save(tmp_path / "x.png")
        assert np.array_equal(levels(open_image(tmp_path / "x.png")), levels(found))


@pytest.mark.parametrize(("mode", "colour", "key"), [("RGB", GREEN, GREEN), ("L", 128, 128), ("1", 1, 1)])
def test_a_transparent_colour_lies_on_white(mode: str, colour, key, tmp_path: Path) -> None:
    Image.new(mode, (2, 2), colour).save(tmp_path / "x.png", transparency=key if mode != "1" else 1)
    assert corner(open_image(tmp_path / "x.png")) == WHITE


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    assert corner(open_image(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))) == (255, 127, 127)


@pytest.mark.parametrize("way", ["I;16", "I;16B", "I", "file", "array", "F", "float array", "tensor"])
def test_deep_levels_are_scaled_to_eight_bits(way: str, tmp_path: Path) -> None:
    deep = np.full((3, 5), 20_000, np.uint16)  # 78 of 255
    source = {
        "I;16": lambda: Image.fromarray(deep),
        "I;16B": lambda: Image.frombytes("I;16B", (5, 3), deep.astype(">u2").tobytes()),
        "I": lambda: Image.fromarray(deep.astype(np.int32)),
        "file": lambda: Image.fromarray(deep).save(tmp_path / "x.png") or tmp_path / "x.png",
        "array": lambda: deep,
        "F": lambda: Image.fromarray((deep / 65535).astype(np.float32)),
        "float array": lambda: deep / 65535,
        "tensor": lambda: torch.full((3, 3, 5), 2 * 20_000 / 65535 - 1),
    }[way]()
    found = open_image(source)
    assert found.size == (5, 3)
    assert (levels(found) == 78).all()
    if way != "tensor":
        assert (levels(open_mask(source)) == 78).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_pillow_becomes_rgb(photo: Image.Image, mode: str) -> None:
    if mode == "LAB":
        source = Image.new("LAB", (6, 4), (255, 0, 0))
        expected = Image.new("RGB", (6, 4), WHITE)
    else:
        source = photo.convert(mode)
        expected = source.convert("RGB")
    found = open_image(source)
    assert found.mode == "RGB"
    assert np.array_equal(levels(found), levels(expected)) or mode == "LAB"


def test_arrays_and_tensors_are_the_image(photo: Image.Image) -> None:
    array = levels(photo)
    pixels = images_to_tensor([photo])
    for source in (array, array.astype(np.float64) / 255, np.asfortranarray(array), array.copy(), pixels[0], pixels):
        assert np.array_equal(levels(open_image(source)), array)
    for source in (np.dstack([array, np.full((4, 6), 255, np.uint8)]), torch.tensor(array).permute(2, 0, 1)):
        assert np.array_equal(levels(open_image(source)), array)
    assert corner(open_image(np.zeros((2, 2, 1), np.uint8))) == (0, 0, 0)
    assert corner(open_image(np.ones((2, 2), bool))) == WHITE
    assert corner(open_image(np.dstack([array, np.zeros((4, 6), np.uint8)]))) == WHITE
    assert open_image(pixels[0].bfloat16()).size == (6, 4)


@given(arrays.arrays(np.uint8, st.tuples(st.just(2), st.integers(1, 5), st.integers(1, 5), st.just(3))))
def test_levels_come_back_from_tensors(array: np.ndarray) -> None:
    pixels = images_to_tensor(array)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    back = tensor_to_images(pixels)
    assert all(np.array_equal(levels(one), other) for one, other in zip(back, array, strict=True))
    with Image.open(io.BytesIO(png_bytes(back[0]))) as again:
        assert np.array_equal(levels(again), array[0])
    assert data_url(back[0]).startswith("data:image/png;base64,iVBOR")


def test_tensors_beyond_the_range_are_clamped_when_they_become_images() -> None:
    (image,) = tensor_to_images(torch.tensor([-5.0, 0.0, 5.0]).reshape(1, 3, 1, 1))
    assert corner(image) == (0, 128, 255)


@pytest.mark.parametrize(
    "source",
    [
        3,
        None,
        b"\x89PNG",
        ["x.png"],
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((4, 4), np.int64),
        np.full((4, 4), 2.0),
        np.full((4, 4), np.nan),
        np.full((4, 4), -0.1),
        np.zeros((4, 4), complex),
        np.array([["a"]]),
        np.array([[None]]),
        torch.zeros(2, 3, 4, 4),
        torch.zeros(4),
        torch.zeros(4, 3, 3),
        torch.full((3, 2, 2), 1.5),
        torch.full((3, 2, 2), torch.nan),
        torch.zeros(3, 0, 4),
        torch.zeros(3, 2, 2, dtype=torch.complex64),
        torch.zeros(3, 2, 2, dtype=torch.int64),
        Image.fromarray(np.full((2, 2), 100_000, np.int32)),
        Image.fromarray(np.full((2, 2), -1, np.int32)),
        Image.fromarray(np.full((2, 2), 200.0, np.float32)),
        Image.new("RGB", (0, 5)),
    ],
    ids=lambda source: f"{type(source).__name__} {getattr(source, 'shape', '')} {getattr(source, 'dtype', '')}",
)
@pytest.mark.parametrize("opened", [open_image, open_mask])
def test_what_is_no_image_is_refused_in_one_sentence(source, opened) -> None:
    with pytest.raises(UsageError, match=r"init_image .*: (give|scale)") as raised:
        opened(source, "init_image")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["missing", "folder", "empty", "text", "truncated", "huge", "svg"])
def test_files_that_are_no_images_are_named(content: str, photo: Image.Image, tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    if content == "folder":
        file.mkdir()
    elif content == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)
        file.write_bytes(png_bytes(Image.fromarray(noise))[:9_000])
    elif content == "huge":
        header = bytearray(png_bytes(photo))
        header[16:24] = (60_000).to_bytes(4, "big") * 2
        file.write_bytes(header)
    elif content != "missing":
        file.write_bytes({"empty": b"", "text": b"<html>", "svg": b"<svg/>"}[content])
    for opened in (open_image, open_mask):
        for source in (file, str(file)):
            with pytest.raises(DataError, match=r"photo\.png") as raised:
                opened(source, "init_image")
            assert "\n" not in str(raised.value)


def test_too_many_pixels_are_refused_wherever_they_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 1_000)
    Image.new("L", (40, 30)).save(tmp_path / "x.png")
    array = np.zeros((30, 40), np.uint8)
    for source in (tmp_path / "x.png", Image.new("L", (40, 30)), array, torch.zeros(3, 30, 40)):
        with pytest.raises(DataError, match="has 40×30 pixels: give"):
            open_image(source)


# Masks: white is inpainted.


def test_white_strokes_on_a_transparent_layer_are_the_mask(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    layer.paste((255, 255, 255, 255), (2, 2, 5, 6))
    layer.save(tmp_path / "layer.png")
    for source in (layer, tmp_path / "layer.png", np.asarray(layer)):
        found = levels(open_mask(source))
        assert (found[2:6, 2:5] == 255).all()
        found = found.copy()
        found[2:6, 2:5] = 0
        assert (found == 0).all()
    hidden_white = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert levels(open_mask(hidden_white)).max() == 0, "white that nobody sees is no stroke"


@pytest.mark.parametrize(
    ("around", "stroke"),
    [((90, 120, 40, 255), (0, 0, 0, 0)), ((0, 0, 0, 255), (255, 255, 255, 0)), ((0, 0, 0, 0), (255, 0, 0, 255))],
    ids=["photograph with a hole", "hole in black", "red strokes"],
)
def test_transparency_that_could_mean_either_is_refused(around, stroke) -> None:
    layer = Image.new("RGBA", (8, 8), around)
    layer.paste(stroke, (2, 2, 5, 6))
    with pytest.raises(UsageError, match="mask is partly transparent, which could mean either: give white"):
        open_mask(layer, "mask")


def test_an_opaque_alpha_changes_no_mask() -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    for mode in ("RGBA", "LA"):
        assert np.array_equal(levels(open_mask(grey.convert(mode))), levels(grey))


@pytest.mark.parametrize("way", ["bool array", "float array", "tensor", "channel", "1-bit", "bool tensor"])
def test_masks_of_every_kind(way: str) -> None:
    hole = np.zeros((6, 8), bool)
    hole[1:4, 2:7] = True
    source = {
        "bool array": hole,
        "float array": hole.astype(np.float32),
        "tensor": torch.from_numpy(hole).float(),
        "channel": torch.from_numpy(hole).float()[None],
        "1-bit": Image.fromarray(hole),
        "bool tensor": torch.from_numpy(hole),
    }[way]
    assert np.array_equal(levels(open_mask(source)) == 255, hole)


@pytest.mark.parametrize(("level", "painted"), [(0, False), (127, False), (128, True), (255, True)])
def test_soft_masks_are_cut_at_half(photo: Image.Image, level: int, painted: bool) -> None:
    mask = open_mask(Image.new("L", (6, 4), level))
    init = InitImage.of([photo], [mask], (8, 8))
    assert init.mask is not None
    assert init.mask.eq(float(painted)).all()


@given(st.binary(max_size=200))
def test_any_bytes_are_an_image_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.bin"
    file.write_bytes(content)
    sentence_of(lambda: open_image(file))
