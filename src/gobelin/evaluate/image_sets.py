"""Image sets: images chosen from a folder, read at one size, and images painted from captions in their place."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from gobelin.data.buckets import Preprocessing
from gobelin.data.captioned_files import METADATA
from gobelin.data.indexed_images import IndexedImages
from gobelin.errors import DataError
from gobelin.evaluate.scored_images import CPU_BATCH_SIZE, GPU_BATCH_SIZE
from gobelin.formats.files import write_text
from gobelin.formats.png import write_png
from gobelin.pipeline import Pipeline

FEWEST_IMAGES = 4
"""Images of a side that are compared at least: KID's subsets are halves, and need two."""
MOST_IMAGES = 5000
"""Images of a side that are compared where no number is given."""
_BATCH_PIXELS = 64**2  # of each of the images in a batch of those sizes


@dataclass(frozen=True)
class ImageSet:
    """Some ``rows`` of captioned images, read at ``size`` pixels: scaled, and cropped to the middle square."""

    images: IndexedImages
    rows: Sequence[int]
    size: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        preprocessing = Preprocessing(size=self.size)
        for row in self.rows:
            yield preprocessing.read(self.images.content(row), str(self.images.source / self.images.names[row]))

    @cached_property
    def captions(self) -> list[str] | None:
        """The first caption of each image, None where one has none."""
        captions = [self.images.captions(row)[:1] for row in self.rows]
        return [one[0] for one in captions] if all(captions) else None

    @property
    def resized(self) -> int:
        """The number of images that have another size."""
        index, rows = self.images.index, list(self.rows)
        return int(((index.widths[rows] != self.size) | (index.heights[rows] != self.size)).sum())


def shuffled_rows(images: IndexedImages, seed: int, fewest: int = FEWEST_IMAGES) -> list[int]:
    """Shuffle the rows of images; raises :class:`DataError` for a folder with less than the ``fewest`` to compare."""
    if len(images) < fewest:
        raise DataError(f"{images.source} has {len(images)} images that can be used: give {fewest} or more")
    return np.random.default_rng(seed).permutation(len(images)).tolist()


def common_side(images: IndexedImages) -> int:
    """Find the median of the images' shorter sides, in pixels: the size at which a folder is compared."""
    return int(np.median(np.minimum(images.index.widths, images.index.heights)))


def paint_captions(
    pipeline: Pipeline,
    captions: Sequence[str],
    seed: int,
    settings: dict[str, Any],
    out: Path | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Paint an image from each caption as it is, without weights; image n has the seed ``seed + n``.

    ``out`` is a folder in which the images are kept, under the names of :func:`write_captions`. ``advance`` is called
    with the number of images of each batch.
    """
    size = painted_size(pipeline)
    most = CPU_BATCH_SIZE if pipeline.unet.device.type == "cpu" else GPU_BATCH_SIZE
    most = max(1, most * _BATCH_PIXELS // size**2)
    for start in range(0, len(captions), most):
        part = list(captions[start : start + most])
        with torch.inference_mode():
            result = pipeline(part, seed=seed + start, weights="none", **settings)
        for number, (image, recorded) in enumerate(zip(result.images, result.settings, strict=True), start):
            if out is not None:
                write_png(out / _name(number), image, recorded)
            yield np.asarray(image)
        advance(len(part))


def write_captions(folder: Path, captions: Sequence[str]) -> None:
    """Write the captions of images that are to be painted, so that the folder can be compared again."""
    require_empty(folder)
    lines = [json.dumps({"file_name": _name(n), "text": text}, ensure_ascii=False) for n, text in enumerate(captions)]
    write_text(folder / METADATA, "\n".join(lines) + "\n")


def require_empty(folder: Path) -> None:
    """Raise :class:`DataError` for a folder with anything in it, and for a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not an empty folder: choose another")


def painted_size(pipeline: Pipeline) -> int:
    """Height and width, in pixels, of the images that a model paints."""
    return pipeline.unet.config.sample_size * pipeline.vae.config.factor


def _name(number: int) -> str:
    return f"{number:06d}.png"
