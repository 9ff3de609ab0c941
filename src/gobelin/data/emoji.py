"""Emoji as a data set: the same characters as five sets have drawn them, with the names that Unicode gives them.

Pictures come from Iconify's packages of the sets, names and keywords from Unicode CLDR's annotations; whoever makes the
data set installs them, and nothing of theirs is part of Gobelin. A concept is one character, so that faces and things
are in, and flags, keycaps, skin tones and couples, which are sequences of characters, are not.
"""

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from gobelin.data.captioned_files import METADATA
from gobelin.errors import DataError, UsageError
from gobelin.formats.files import write_json, write_text

TRAIN, HELD_OUT, ABOUT = "train", "heldout", "emoji.json"
"""The folders of a data set, and the file that says what it is made of."""
NAMES_PACKAGE = "cldr-annotations-full"
_NAMES = f"{NAMES_PACKAGE}/annotations/en/annotations.json"
_HELD_OUT_SHARE = 0.1
_VARIATION_SELECTOR = "fe0f"  # asks for a character's picture instead of its glyph, and says nothing else
_FIRST = 0xA9  # ©: before it are digits and signs that are emoji as keycaps alone
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONS = range(0x1F1E6, 0x1F200)  # letters, two of which are a flag
_KEYWORDS = 3


@dataclass(frozen=True, kw_only=True)
class EmojiStyle:
    """A set of emoji by one designer: the word for it in captions, and its package.

    ``named_by`` is the package that says which character a picture is of; of two sets one names the pictures of both.
    """

    word: str
    package: str
    named_by: str


STYLES = {
    style.word: style
    for style in (
        EmojiStyle(word="noto", package="@iconify-json/noto", named_by="@iconify-json/noto"),
        EmojiStyle(word="blob", package="@iconify-json/noto-v1", named_by="@iconify-json/noto"),
        EmojiStyle(word="twemoji", package="@iconify-json/twemoji", named_by="@iconify-json/twemoji"),
        EmojiStyle(word="flat", package="@iconify-json/fluent-emoji-flat", named_by="@iconify-json/fluent-emoji-flat"),
        EmojiStyle(word="glossy", package="@iconify-json/fluent-emoji", named_by="@iconify-json/fluent-emoji-flat"),
    )
}
PACKAGES = (*(style.package for style in STYLES.values()), NAMES_PACKAGE)


@dataclass(frozen=True, kw_only=True)
class EmojiConcept:
    """A character, its name, and keywords of it that its name does not have, both as CLDR has them in English."""

    character: str
    name: str
    keywords: tuple[str, ...]

    def captions(self, style: str) -> list[str]:
        """Write captions of its picture in a style, in several forms; the first is the one that models are asked by."""
        forms = [
            f"{self.name}, {style}",
            f"{style} {self.name}",
            f"{style} emoji of {self.name}",
            f"{self.name} in {style} style",
            self.name,
        ]
        chosen = sorted(self.keywords, key=lambda word: fraction_of_names(self.character, style, word))[:_KEYWORDS]
        if chosen:
            forms += [f"{self.name}, {' '.join(chosen)}, {style}", f"{' '.join(chosen)}, {style}"]
        return forms


@dataclass(frozen=True, kw_only=True)
class EmojiPicture:
    """A picture of a concept in a style, as SVG with the turns that its set asks for, in quarters and mirrors."""

    concept: EmojiConcept
    style: str
    svg: str
    mirrored: bool = False
    flipped: bool = False
    quarter_turns: int = 0

    @property
    def file_name(self) -> str:
        """Its name in a data set: the character's code points and the style."""
        return f"{'-'.join(f'{ord(one):x}' for one in self.concept.character)}-{self.style}.png"

    def render(self, size: int) -> Image.Image:
        """Draw it into a square of ``size`` pixels with a transparent background; raises :class:`DataError`."""
        from resvg_py import svg_to_bytes

        try:
            png = bytes(svg_to_bytes(svg_string=self.svg, width=size, height=size, skip_system_fonts=True))
        except ValueError as error:
            raise DataError(
                f"the picture of {self.concept.name!r} in {STYLES[self.style].package} cannot be drawn ({error}): "
                "install the package again"
            ) from error
        drawn = Image.open(io.BytesIO(png)).convert("RGBA")
        if drawn.size != (size, size):  # a set that draws in another aspect
            square = Image.new("RGBA", (size, size))
            square.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
            drawn = square
        if self.mirrored:
            drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.flipped:
            drawn = drawn.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return drawn.rotate(-90 * self.quarter_turns) if self.quarter_turns else drawn


class EmojiPackages:
    """The packages of a ``node_modules`` folder, opened when they are asked for.

    Raises :class:`UsageError` for a style that there is not, and where ``resvg_py``, which draws, is not installed;
    :class:`DataError` for packages that are not there, or are not what they were.
    """

    def __init__(self, folder: Path, styles: tuple[str, ...] = tuple(STYLES)):
        self.folder = folder
        for word in styles:
            if word not in STYLES:
                raise UsageError(f"unknown style {word!r}: the choices are {', '.join(STYLES)}")
        self.styles = tuple(STYLES[word] for word in dict.fromkeys(styles))
        needed = [NAMES_PACKAGE]
        for style in self.styles:
            needed += [style.package, style.named_by]
        self.names = list(dict.fromkeys(needed))
        missing = [name for name in self.names if not (folder / name / "package.json").is_file()]
        if missing:
            raise DataError(f"{folder} has no {', '.join(missing)}: npm install {' '.join(missing)}, and give its path")
        try:
            version("resvg_py")
        except ImportError as error:
            raise UsageError("resvg_py, which draws SVG, is not installed: pip install 'gobelin[emoji]'") from error

    @cached_property
    def concepts(self) -> dict[str, EmojiConcept]:
        """The concepts by their character: those that CLDR names, in the order of their code points."""
        names = _read(self.folder / _NAMES)
        try:
            found = {
                character: EmojiConcept(
                    character=character, name=entry["tts"][0], keywords=_other_words(entry["tts"][0], entry["default"])
                )
                for character, entry in sorted(names["annotations"]["annotations"].items())
                if _is_concept(character) and "default" in entry and "tts" in entry
            }
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _not_as_expected(self.folder / _NAMES, error) from error
        return found

    def pictures(self) -> Iterator[EmojiPicture]:
        """List the pictures of all concepts in all styles, concept by concept."""
        icons = {style.word: self._icons(style) for style in self.styles}
        for character, concept in self.concepts.items():
            for style in self.styles:
                if (found := icons[style.word].get(character)) is not None:
                    yield EmojiPicture(concept=concept, style=style.word, **found)

    def about(self) -> dict[str, dict[str, str]]:
        """Read the version and the licence of each package, and whose it is."""
        found = {}
        for name in self.names:
            package = _read(self.folder / name / "package.json")
            file = self.folder / name / "info.json"
            info = _read(file) if file.is_file() else {}
            author = info.get("author", package.get("author", ""))
            found[name] = {
                "version": str(package.get("version", "")),
                "licence": str(package.get("license", "")),
                "author": str(author.get("name", "") if isinstance(author, dict) else author),
                "from": str(author.get("url", "") if isinstance(author, dict) else ""),
            }
        return found

    def _icons(self, style: EmojiStyle) -> dict[str, dict[str, Any]]:
        """Read the pictures of a style by their character, as the fields of :class:`EmojiPicture`."""
        file = self.folder / style.package / "icons.json"
        icons = _read(file)
        named = _read(self.folder / style.named_by / "chars.json")
        try:
            found = {
                character: picture
                for codes, name in named.items()
                if (character := _character(codes)) is not None and (picture := _picture(icons, name)) is not None
            }
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise _not_as_expected(file, error) from error
        if not found:
            raise DataError(f"{file} has no pictures of characters: install its package again")
        return found


def is_held_out(character: str, style: str) -> bool:
    """Choose the pairs of a concept and a style that no model is to see, a tenth of all, by their names alone."""
    return fraction_of_names("held out", character, style) < _HELD_OUT_SHARE


def write_emoji(packages: EmojiPackages, folder: Path, size: int) -> dict[str, int]:
    """Write the data set: a folder to train on, one of held-out pairs, and what they are made of.

    Each folder is one of captioned images; its metadata, beside the captions, has the concept, its name and its style.
    A concept whose styles would all be held out stays in training. The folder gets its name when all of it is written.
    Returns the numbers of pictures by folder, and of concepts. Raises :class:`DataError` for a folder with anything in
    it.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / folder.name
        counts = _write_folders(packages, made, size)
        about = {"size": size, **counts, "resvg_py": version("resvg_py"), "packages": packages.about()}
        write_json(made / ABOUT, about)
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
    return counts


def _write_folders(packages: EmojiPackages, folder: Path, size: int) -> dict[str, int]:
    by_concept: dict[str, list[EmojiPicture]] = {}
    for picture in packages.pictures():
        by_concept.setdefault(picture.concept.character, []).append(picture)
    lines: dict[str, list[str]] = {TRAIN: [], HELD_OUT: []}
    for split in lines:
        (folder / split).mkdir(parents=True)
    for character, pictures in by_concept.items():
        held_out = {picture.style for picture in pictures if is_held_out(character, picture.style)}
        if len(held_out) == len(pictures):
            held_out.clear()
        for picture in pictures:
            split = HELD_OUT if picture.style in held_out else TRAIN
            picture.render(size).save(folder / split / picture.file_name)
            lines[split].append(json.dumps(_entry(picture), ensure_ascii=False))
    for split, entries in lines.items():
        write_text(folder / split / METADATA, "\n".join(entries) + "\n")
    return {TRAIN: len(lines[TRAIN]), HELD_OUT: len(lines[HELD_OUT]), "concepts": len(by_concept)}


def _entry(picture: EmojiPicture) -> dict[str, Any]:
    """Write the line of metadata of a picture."""
    return {
        "file_name": picture.file_name,
        "text": picture.concept.captions(picture.style),
        "concept": picture.concept.character,
        "name": picture.concept.name,
        "style": picture.style,
    }


def fraction_of_names(*names: str) -> float:
    """Draw a number in 0 … 1 by names, the same ever after: a choice that no random generator has part in."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _is_concept(character: str) -> bool:
    if len(character) != 1:
        return False
    return ord(character) >= _FIRST and ord(character) not in _SKIN_TONES and ord(character) not in _REGIONS


def _character(codes: str) -> str | None:
    """Read the code points of a picture as one character, None for a sequence of several."""
    parts = [part for part in codes.lower().split("-") if part != _VARIATION_SELECTOR]
    if len(parts) != 1:
        return None
    character = chr(int(parts[0], 16))
    return character if _is_concept(character) else None


def _other_words(name: str, keywords: list[str]) -> tuple[str, ...]:
    """List the keywords that say what the name does not."""
    said = set(re.findall(r"\w+", name.lower()))
    return tuple(word for word in keywords if not said.issuperset(re.findall(r"\w+", word.lower())))


def _picture(icons: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Find a picture by its name, or by another's whose turned copy it is (Iconify's "aliases"); None for none."""
    turned: dict[str, Any] = {"mirrored": False, "flipped": False, "quarter_turns": 0}
    for _ in range(5):
        if name in icons["icons"]:
            return {"svg": _svg(icons["icons"][name], icons), **turned}
        alias = icons.get("aliases", {}).get(name)
        if alias is None:
            return None
        name = alias["parent"]
        turned["mirrored"] ^= bool(alias.get("hFlip", False))
        turned["flipped"] ^= bool(alias.get("vFlip", False))
        turned["quarter_turns"] = (turned["quarter_turns"] + int(alias.get("rotate", 0))) % 4
    return None


def _svg(icon: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Write the picture as a document; its size is its own or its set's, or Iconify's default of 16."""
    left, top, width, height = (
        float(icon.get(key, defaults.get(key, default)))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {width:g} {height:g}">{icon["body"]}</svg>'
    )


def _read(file: Path) -> dict[str, Any]:
    """Read the object in a package's JSON file; raises :class:`DataError`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"no file at {file}: install its package again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}): install its package again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, expected an object: install its package again")
    return content


def _not_as_expected(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} is not what its package has ({type(error).__name__}: {error}): install it again")
