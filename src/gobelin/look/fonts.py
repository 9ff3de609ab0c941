"""Text on sheets: fonts by run of letters, line breaking and drawing.

Latin, Greek and Cyrillic come in Source Sans 3 (a dependency); other scripts in the fonts that the machine has.
"""

import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import fontpkg
from PIL import Image, ImageDraw, ImageFont, features

_REGULAR = 400  # of Source Sans 3's weights 200 to 900; the file's default is 200, too thin to read at 12 pixels
_BASELINE = 0.85  # of the size, below the top of a line
_CODE = 0.6  # of the size: the codes of letters that no font has
_FRAME = 2  # pixels between such a code and its frame
_NO_CHARACTER = "\U0010ffff"  # Unicode assigns it to nothing, so that fonts answer with their missing-letter box

# Tried first, in this order: wide coverage, plain shapes. Then any other.
_PREFERRED = (
    "DejaVuSans",
    "NotoSans",
    "Arial Unicode",
    "Hiragino Sans",
    "PingFang",
    "AppleSDGothicNeo",
    "msyh",
    "YuGoth",
    "malgun",
    "segoeui",
    "DroidSansFallback",
    "wqy-",
    "unifont",
)
_NOT_PLAIN = ("bold", "italic", "oblique", "black", "light", "thin", "condensed", "mono", "serif", "narrow")
_NOT_TEXT = ("lastresort", "coloremoji")  # a box for every letter; images in place of outlines


@dataclass(frozen=True)
class _Run:
    """Letters in one font; ``file`` is None where no font has them."""

    text: str
    file: Path | None

    def width(self, size: int) -> float:
        """Pixels from this run's start to the next one's."""
        if self.file is None:
            return _font(_own(), _code_size(size)).getlength(_code(self.text)) + 2 * _FRAME + 3
        return _font(self.file, size).getlength(self.text)


def text_width(text: str, size: int) -> float:
    """Measure a line of text in pixels."""
    return sum(run.width(size) for run in _runs(text))


def wrap_text(text: str, width: float, size: int, lines: int) -> list[str]:
    """Break text into lines of at most ``width`` pixels; the last ends in "…" if there would be more than ``lines``."""
    broken = [""]
    for word in text.split():
        longer = f"{broken[-1]} {word}".lstrip()
        if text_width(longer, size) <= width:
            broken[-1] = longer
        else:
            *full, last = _split_word(word, width, size)
            broken += [*full, last]
    broken = broken[1:] if not broken[0] and len(broken) > 1 else broken
    if len(broken) <= lines:
        return broken
    last = f"{broken[lines - 1]} …"
    while text_width(last, size) > width and len(last) > 1:
        last = f"{last[:-2].rstrip()}…"
    return [*broken[: lines - 1], last]


def draw_text(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, fill: str) -> None:
    """Draw a line of text; ``place`` is its left and its top, ``size`` the height of its letters' em, in pixels."""
    x, y = place
    baseline = y + _BASELINE * size
    for run in _runs(text):
        width = run.width(size)
        if run.file is None:
            small = _code_size(size)
            top, right = baseline - 0.72 * small - 2 * _FRAME, x + width - 3
            draw.rectangle((x, top, right, baseline + _FRAME - 1), outline=fill)
            draw.text(
                (x + _FRAME + 1, baseline - _FRAME), _code(run.text), fill=fill, font=_font(_own(), small), anchor="ls"
            )
        else:
            # A space after letters written from right to left would be laid to their left: it stands by its width.
            draw.text((x, baseline), _ordered(run.text.rstrip()), fill=fill, font=_font(run.file, size), anchor="ls")
        x += width


@lru_cache(maxsize=4096)
def _runs(text: str) -> tuple[_Run, ...]:
    """Split text into runs of letters in one font each; warn of letters that no font has."""
    runs: list[_Run] = []
    for letter in unicodedata.normalize("NFC", text):
        if unicodedata.category(letter) in ("Cc", "Cf") or "\ufe00" <= letter <= "\ufe0f":
            continue  # marks of direction, joiners, variants: nothing to see
        before = runs[-1].file if runs else None
        joins = letter.isspace() or unicodedata.combining(letter)
        file = before if joins and before is not None and _has(before, letter) else _font_of(letter)
        if file is not None and file == before:
            runs[-1] = _Run(runs[-1].text + letter, file)
        else:
            runs.append(_Run(letter, file))
    if any(run.file is None for run in runs):
        warnings.warn(
            "letters that no font on this machine has are drawn as their codes (U+…): install one that has them, such "
            "as Noto Sans CJK",
            stacklevel=2,
        )
    return tuple(runs)


def _split_word(word: str, width: float, size: int) -> Iterator[str]:
    """Split a word that may be wider than a line into pieces that are not, of at least a letter each."""
    piece = ""
    for letter in word:
        if piece and text_width(piece + letter, size) > width:
            yield piece
            piece = ""
        piece += letter
    yield piece


def _ordered(text: str) -> str:
    """Order letters from left to right if Pillow cannot do that itself for Hebrew and Arabic (without raqm)."""
    if features.check("raqm"):
        return text
    leftward = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)
    return text[::-1] if leftward else text


def _code(letter: str) -> str:
    return f"U+{ord(letter):04X}"


def _code_size(size: int) -> int:
    return max(7, round(_CODE * size))


@cache
def _own() -> Path:
    """Find the file of Source Sans 3 (SIL Open Font License 1.1)."""
    return Path(fontpkg.path("Source Sans 3"))


@cache
def _font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    if file != _own():
        return ImageFont.truetype(str(file), size)
    # Its scripts need no shaping, and Pillow's own layout spaces small letters more evenly than raqm's.
    font = ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)
    font.set_variation_by_axes([_REGULAR])
    return font


@cache
def _font_of(letter: str) -> Path | None:
    """Find the first font that has a letter; every font has spaces."""
    if letter.isspace() or _has(_own(), letter):
        return _own()
    return next((file for file in _installed() if _has(file, letter)), None)


@lru_cache(maxsize=65536)
def _has(file: Path, letter: str) -> bool:
    """Tell a letter that a font has from one that it draws as its missing-letter box."""
    try:
        ink, missing = _ink(file, letter), _ink(file, _NO_CHARACTER)
    except OSError:  # a damaged file, or images of one size
        return False
    return ink != missing and (letter.isspace() or any(ink))


def _ink(file: Path, letter: str) -> bytes:
    """Draw a letter alone."""
    image = Image.new("L", (40, 40))
    ImageDraw.Draw(image).text((8, 8), letter, fill=255, font=_font(file, 20))
    return image.tobytes()


@cache
def _installed() -> tuple[Path, ...]:
    """List the machine's font files, those with wide coverage and plain shapes first."""
    found = [
        file
        for folder in _folders()
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in (".ttf", ".otf", ".ttc") and not any(part in file.stem.lower() for part in _NOT_TEXT)
    ]
    return tuple(sorted(found, key=_rank))


def _rank(file: Path) -> tuple[bool, int]:
    stem = file.stem.lower()
    first = [number for number, name in enumerate(_PREFERRED) if stem.startswith(name.lower())]
    return any(part in stem for part in _NOT_PLAIN), first[0] if first else len(_PREFERRED)


def _folders() -> list[Path]:
    """List the folders in which Linux, macOS and Windows keep fonts."""
    home = Path.home()
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    if sys.platform == "win32":
        windows, local = os.environ.get("WINDIR", r"C:\Windows"), os.environ.get("LOCALAPPDATA", str(home))
        return [Path(windows) / "Fonts", Path(local) / "Microsoft/Windows/Fonts"]
    return [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".local/share/fonts", home / ".fonts"]
