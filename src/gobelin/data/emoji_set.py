"""Emoji set: the data set that ``gobelin data emoji`` wrote, read whole, with concept and style of each picture."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8

from gobelin.data.captioned_files import METADATA
from gobelin.data.emoji import ABOUT, HELD_OUT, TRAIN
from gobelin.data.image_folder import read_image
from gobelin.errors import DataError
from gobelin.formats.files import read_text


@dataclass(frozen=True, kw_only=True, eq=False)
class EmojiSet:
    """Pictures on white, uint8 RGB, of concepts and styles that are numbered as in ``concept_names`` and ``styles``.

    ``captions`` are the first of each, by which a model is asked for it; ``is_held_out`` says which no model is to see.
    """

    images: UInt8[np.ndarray, "images size size 3"]
    concept: Int[np.ndarray, " images"]
    style: Int[np.ndarray, " images"]
    captions: list[str]
    is_held_out: Bool[np.ndarray, " images"]
    concept_names: list[str]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """The name of the concept and the style of each picture."""
        names = zip(self.concept.tolist(), self.style.tolist(), strict=True)
        return [(self.concept_names[concept], self.styles[style]) for concept, style in names]


def read_emoji(folder: Path, size: int = 64) -> EmojiSet:
    """Read both parts of a data set; raises :class:`DataError` for a folder that is none, or has lost something."""
    if not (folder / ABOUT).is_file():
        raise DataError(f"{folder} has no {ABOUT}: give a folder that gobelin data emoji wrote")
    images, names, styles, captions, held_out = [], [], [], [], []
    for part in (TRAIN, HELD_OUT):
        for number, line in enumerate(_lines(folder / part / METADATA), start=1):
            try:
                entry = json.loads(line)
                file, caption = folder / part / entry["file_name"], entry["text"][0]
                names.append(entry["name"])
                styles.append(entry["style"])
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise DataError(
                    f"line {number} of {folder / part / METADATA} is not one that gobelin data emoji writes "
                    f"({type(error).__name__}: {error}): write the folder again"
                ) from error
            images.append(read_image(file, size))
            captions.append(caption)
            held_out.append(part == HELD_OUT)
    if not images:
        raise DataError(f"{folder} has no pictures: write it again by gobelin data emoji")
    concept_names, style_names = sorted(set(names)), sorted(set(styles))
    concept_number = {name: number for number, name in enumerate(concept_names)}
    return EmojiSet(
        images=np.stack(images),
        concept=np.array([concept_number[name] for name in names]),
        style=np.array([style_names.index(name) for name in styles]),
        captions=captions,
        is_held_out=np.array(held_out),
        concept_names=concept_names,
        styles=style_names,
    )


def _lines(file: Path) -> list[str]:
    try:
        return read_text(file).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): write the folder again by gobelin data emoji") from error
