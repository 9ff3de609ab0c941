"""A report on a folder of captioned images before training: sizes, encodings, captions, duplicates."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from gobelin.data.captioned_files import SkippedImage
from gobelin.data.image_folder import ImageFolderDataset
from gobelin.images import open_image
from gobelin.tokenizer import Tokenizer

LOSES_MUCH = 1 / 3
"""The share of an image that the square crop cuts off, from which on it is counted."""
_HASH_SIDE = 8
_THUMBNAIL = 16
_BITS_APART, _LEVELS_APART = 3, 24  # of 64 bits; of 255 levels, in any pixel of the thumbnails
_MOST_COMPARED = 2000  # images that share a quarter of the hash, such as drawings on white: more take too long
_ALPHA, _TURNED, _ANIMATED = "transparent, laid on white", "turned by EXIF", "animated, first frame taken"
_DEEP, _CMYK, _GREY, _PALETTE = "16 bits or more, scaled to 8", "CMYK, converted", "grey", "palette"
_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """Report on a folder of captioned images; counts are of those that can be used, at ``size`` pixels.

    ``enlarged`` are smaller than ``size``; ``cropped`` lose more than a third to the square crop. ``encodings`` and
    ``formats`` count images. ``tokens`` are the shortest, the median and the longest caption's, of a tokenizer trained
    on these captions; ``cut`` are captions beyond ``max_length`` of them. ``duplicates`` are groups of files with the
    same bytes, ``near_duplicates`` of images that look alike at 8×8, without those.
    """

    images: int
    size: int
    skipped: tuple[SkippedImage, ...]
    formats: Mapping[str, int]
    encodings: Mapping[str, int]
    widths: tuple[int, float, int]
    heights: tuple[int, float, int]
    aspects: tuple[float, float, float]
    enlarged: tuple[str, ...]
    cropped: tuple[str, ...]
    captions: int
    distinct_captions: int
    tokens: tuple[int, float, int]
    max_length: int
    cut: tuple[str, ...]
    words: int
    words_once: int
    duplicates: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]

    def json(self) -> dict[str, Any]:
        """Return the report for a JSON file."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Say it in lines for people: what is fine in one, what to look at in one each."""
        said = [
            f"{self.images:,} captioned images can be used, {len(self.skipped):,} skipped",
            f"sizes: {_range(self.widths)} wide, {_range(self.heights)} high; width : height {_range(self.aspects)}",
            f"files: {_counted(self.formats)}" + (f"; {_counted(self.encodings)}" if self.encodings else ""),
            f"captions: {self.captions:,}, of which {self.distinct_captions:,} distinct; "
            f"{_range(self.tokens)} tokens; {self.words:,} different words, {self.words_once:,} of them once only",
        ]
        for files, what in (
            (self.enlarged, f"smaller than {self.size} pixels and enlarged"),
            (self.cropped, "lose more than a third to the square crop"),
            (self.cut, f"have captions of more than {self.max_length} tokens, which are cut (tokenizer.max-length)"),
        ):
            if files:
                said.append(f"{len(files):,} images {what}: {_first(files)}")
        for groups, what in ((self.duplicates, "the same file"), (self.near_duplicates, "nearly the same image")):
            if groups:
                count = sum(map(len, groups))
                said.append(f"{count:,} images are {what} as another, in {len(groups):,} groups: {_first(groups[0])}")
        reasons = Counter(skip.reason.partition(" (")[0] for skip in self.skipped)
        said += [f"skipped, {reason}: {count:,}" for reason, count in reasons.most_common(20)]
        return said


def report_folder(
    dataset: ImageFolderDataset,
    vocab_size: int,
    max_length: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> FolderReport:
    """Look at every image and caption of a folder; the tokenizer is trained on them as the training's would be."""
    formats: Counter[str] = Counter()
    encodings: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    by_content: defaultdict[str, list[str]] = defaultdict(list)
    looks: list[tuple[int, UInt8[np.ndarray, "16 16 3"]]] = []
    names = [one.file.relative_to(dataset.folder).as_posix() for one in dataset.files]
    for number, (name, one) in enumerate(zip(names, dataset.files, strict=True), start=1):
        with Image.open(one.file) as image:
            formats[image.format or "?"] += 1
            encodings.update(_encodings(image))
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
            sizes.append((image.height, image.width) if turned else image.size)
        with one.file.open("rb") as file:
            by_content[hashlib.file_digest(file, "sha256").hexdigest()].append(name)
        looks.append(_look(one.file))
        advance(number, len(names))
    captions = [caption for one in dataset.files for caption in one.captions]
    tokenizer = Tokenizer.train(captions, vocab_size, max_length)
    lengths = {caption: len(tokenizer.tokens(caption)) + 2 for caption in set(captions)}
    words = Counter(word for caption in captions for word in caption.lower().split())
    duplicates = [group for group in by_content.values() if len(group) > 1]
    repeated = {name for group in duplicates for name in group[1:]}
    alike = [[names[index] for index in group if names[index] not in repeated] for group in _groups_alike(looks)]
    return FolderReport(
        images=len(names),
        size=dataset.size,
        skipped=tuple(dataset.skipped),
        formats=dict(formats.most_common()),
        encodings=dict(encodings.most_common()),
        widths=_spread([width for width, _ in sizes]),
        heights=_spread([height for _, height in sizes]),
        aspects=_spread([width / height for width, height in sizes]),
        enlarged=_named(names, [min(size) < dataset.size for size in sizes]),
        cropped=_named(names, [1 - min(size) / max(size) > LOSES_MUCH for size in sizes]),
        captions=len(captions),
        distinct_captions=len(lengths),
        tokens=_spread(list(lengths.values())),
        max_length=max_length,
        cut=_named(names, [any(lengths[one] > max_length for one in entry.captions) for entry in dataset.files]),
        words=len(words),
        words_once=sum(count == 1 for count in words.values()),
        duplicates=tuple(map(tuple, duplicates)),
        near_duplicates=tuple(tuple(group) for group in alike if len(group) > 1),
    )


def _encodings(image: Image.Image) -> list[str]:
    """Name what is special in how an image is stored."""
    told = {
        _ALPHA: image.has_transparency_data,
        _TURNED: image.getexif().get(_ORIENTATION, 1) > 1,
        _ANIMATED: getattr(image, "n_frames", 1) > 1,
        _DEEP: image.mode.startswith(("I", "F")),
        _CMYK: image.mode == "CMYK",
        _GREY: image.mode in ("1", "L", "LA"),
        _PALETTE: image.mode == "P",
    }
    return [name for name, is_so in told.items() if is_so]


def _look(file: Path) -> tuple[int, UInt8[np.ndarray, "16 16 3"]]:
    """Hash what an image looks like (dHash): whether each of 8×8 pixels is lighter than its neighbour; and shrink it.

    The hash finds, and the small image tells: drawings on white have few hashes.
    """
    image = open_image(file, at_least=_THUMBNAIL)
    small = ImageOps.fit(image, (_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX)
    levels = np.asarray(small, dtype=np.int16).sum(axis=2)
    lighter = np.packbits(levels[:, 1:] > levels[:, :-1] + 8)
    thumbnail = ImageOps.fit(image, (_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return int.from_bytes(lighter.tobytes(), "big"), np.asarray(thumbnail)


def _groups_alike(looks: Sequence[tuple[int, UInt8[np.ndarray, "16 16 3"]]]) -> list[list[int]]:
    """Group images whose hashes differ in three bits at most and whose pixels, at 16×16, are near.

    Of four quarters of two such hashes one at least is equal: only images that share a quarter are compared.
    """
    hashes = np.array([one for one, _ in looks], dtype=np.uint64)
    thumbnails = np.stack([thumbnail for _, thumbnail in looks]).astype(np.int16)
    group = list(range(len(looks)))

    def first(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = group[index]
        return index

    for quarter in range(4):
        values = (hashes >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)
        order = np.argsort(values, kind="stable")
        for shared in np.split(order, np.flatnonzero(np.diff(values[order])) + 1):
            for place, index in enumerate(shared[:-1][:_MOST_COMPARED]):
                others = shared[place + 1 :]
                others = others[np.bitwise_count(hashes[others] ^ hashes[index]) <= _BITS_APART]
                apart = abs(thumbnails[others] - thumbnails[index]).max(axis=(1, 2, 3), initial=0)
                for other in others[apart <= _LEVELS_APART]:
                    group[first(int(other))] = first(int(index))
    found: defaultdict[int, list[int]] = defaultdict(list)
    for index in range(len(looks)):
        found[first(index)].append(index)
    return [members for members in found.values() if len(members) > 1]


def _named(names: Sequence[str], are_so: Sequence[bool]) -> tuple[str, ...]:
    return tuple(name for name, is_so in zip(names, are_so, strict=True) if is_so)


def _spread(values: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return the least, the median and the greatest."""
    return min(values), median(values), max(values)


def _range(spread: tuple[float, float, float]) -> str:
    low, middle, high = (f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in spread)
    return low if low == high else f"{low} to {high} (median {middle})"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _first(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
