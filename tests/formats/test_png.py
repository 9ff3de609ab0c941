from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gobelin.errors import DataError
from gobelin.formats.png import a1111_parameters, read_png_settings, write_png

SETTINGS = {
    "prompt": "a red circle above a blue square",
    "negative_prompt": "",
    "steps": 20,
    "sampler": "dpmpp_2m",
    "guidance": 7.5,
    "seed": 42,
    "width": 64,
    "height": 48,
    "model": "runs/nano",
}


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        "",
        "ein grüner Kreis",
        "赤い丸 🔴 “quoted”",
        'two\nlines\tand "quotes" \\',
        "nul \x00 in it",
        "x" * 5000,
    ],
    ids=["plain", "empty", "latin", "unicode", "escapes", "nul", "long"],
)
def test_a_picture_remembers_its_settings_and_its_pixels(prompt: str, picture: Image.Image, tmp_path: Path) -> None:
    settings = {**SETTINGS, "prompt": prompt, "negative_prompt": prompt, "extra": [1, None, {"a": 0.5}]}
    file = tmp_path / "out" / "picture.png"
    write_png(file, picture, settings)
    assert read_png_settings(file) == settings
    with Image.open(file) as read:
        assert read.format == "PNG"
        assert np.array_equal(np.asarray(read), np.asarray(picture))
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("prompt", ["a red circle", "赤い丸 🔴"])
def test_the_web_ui_finds_its_own_text(prompt: str, picture: Image.Image, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture, {**SETTINGS, "prompt": prompt})
    with Image.open(tmp_path / "a.png") as read:
        assert read.info["parameters"].splitlines()[0] == prompt


def test_the_web_ui_text_is_prompt_negative_prompt_and_fields() -> None:
    fields = "Steps: 20, Sampler: dpmpp_2m, CFG scale: 7.5, Seed: 42, Size: 64x48, Model: runs/nano"
    assert a1111_parameters(SETTINGS) == f"a red circle above a blue square\n{fields}"
    assert a1111_parameters({**SETTINGS, "negative_prompt": "blur"}) == (
        f"a red circle above a blue square\nNegative prompt: blur\n{fields}"
    )


def test_a_picture_without_settings_is_named(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "plain.png")
    with pytest.raises(DataError, match=r"plain\.png carries no settings"):
        read_png_settings(tmp_path / "plain.png")


@pytest.mark.parametrize("content", [None, b"not a picture"])
def test_what_is_no_picture_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png cannot be read as a picture"):
        read_png_settings(file)
