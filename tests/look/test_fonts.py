"""Letters are drawn in a font that has them, or as their codes, and lines fit."""

import unicodedata
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageDraw, features

from gobelin.look import fonts
from gobelin.look.fonts import draw_text, text_width, wrap_text

CHINESE = "\u4e2d"


def drawn(text: str, size: int = 24) -> np.ndarray:
    """Ink of a line of text, [48, 400], 255 where the letters are."""
    image = Image.new("L", (400, 2 * size))
    draw_text(ImageDraw.Draw(image), (8, 8), text, size, "white")
    return np.asarray(image)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that has no font but the one that comes along."""
    monkeypatch.setattr(fonts, "_installed", lambda: ())
    fonts._font_of.cache_clear()
    fonts._runs.cache_clear()
    yield
    fonts._font_of.cache_clear()
    fonts._runs.cache_clear()


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("letter", "äöüßéèñç€–—жλ“”…×→şłžőșğæøΩЩіѣάốẞ")
def test_letters_of_europe_are_drawn_on_any_machine(letter: str) -> None:
    own = fonts._font(fonts._own(), 24)
    box = own.getmask("\U0010ffff")
    shape = own.getmask(letter)
    assert (shape.size, bytes(shape)) != (box.size, bytes(box))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ink = drawn(letter)
    assert ink.max() > 128
    assert not np.array_equal(ink, drawn("o"))


@pytest.mark.usefixtures("bare")
def test_a_letter_that_no_font_has_is_drawn_as_its_code() -> None:
    with pytest.warns(UserWarning, match=r"drawn as their codes \(U\+…\): install one that has them"):
        ink = drawn(CHINESE)
    assert ink.max() > 128
    inside = drawn("U+4E2D", fonts._code_size(24))
    rows, columns = np.nonzero(inside)
    letters = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    windows = np.lib.stride_tricks.sliding_window_view(ink, letters.shape)
    assert (windows == letters).all(axis=(2, 3)).any(), "the code stands in the ink"
    with pytest.warns(UserWarning, match="codes"):
        assert not np.array_equal(drawn("\u4e2c"), ink), "another letter, another code"


def test_a_letter_of_another_script_comes_from_the_machine_or_as_its_code() -> None:
    fonts._runs.cache_clear()
    file = fonts._font_of(CHINESE)
    if file is None:
        with pytest.warns(UserWarning, match="codes"):
            assert drawn(CHINESE).any()
    else:
        assert fonts._has(file, CHINESE)
        assert drawn(CHINESE).any()


@pytest.mark.usefixtures("bare")
def test_the_warning_comes_once() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for letter in "\u4e2d\u4e2c\u4e2b":
            text_width(f"a {letter}", 15)
            text_width(f"a {letter}", 15)
    assert len(said) == 1


def test_text_is_split_where_the_font_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_font_of", lambda letter: fonts._own() if letter.isascii() else fonts._own().parent)
    monkeypatch.setattr(fonts, "_has", lambda file, letter: True)
    runs = fonts._runs.__wrapped__("red עיגול אדום ring")
    assert [run.text for run in runs] == ["red ", "עיגול אדום ", "ring"]
    assert "".join(run.text for run in fonts._runs.__wrapped__("e\u0301 \u200dx\ufe0f")) == "é x"


@pytest.mark.parametrize("text", ["", "a", "café – 3 × жук", "a  b"])
def test_a_line_is_as_wide_as_its_ink(text: str) -> None:
    columns = np.flatnonzero(drawn(text).any(axis=0))
    last = columns[-1] + 1 if len(columns) else 8
    assert last - 8 <= text_width(text, 24) + 2
    assert text_width(text, 24) <= last - 8 + 6


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow cannot order letters here")
def test_without_raqm_hebrew_reads_from_right_to_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fonts._ordered("אבג") == "אבג"
    monkeypatch.setattr(features, "check", lambda feature: False)
    assert fonts._ordered("אבג") == "גבא"
    assert fonts._ordered("red") == "red"


def test_text_is_broken_into_lines_that_fit() -> None:
    lines = wrap_text("many words that do not fit into one line of so few pixels", 90, 12, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert wrap_text("short", 90, 12, 3) == ["short"]
    assert wrap_text("", 90, 12, 3) == [""]
    long = wrap_text("a Donaudampfschifffahrtsgesellschaftskapitänsmütze is long", 90, 12, 9)
    assert "".join(long).replace(" ", "") == "aDonaudampfschifffahrtsgesellschaftskapitänsmützeislong"
    for line in [*lines, *long]:
        assert text_width(line, 12) <= 90
    assert all(unicodedata.is_normalized("NFC", line) for line in long)
