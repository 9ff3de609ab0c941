"""A report on a folder of captioned images before training: sizes, encodings, captions, duplicates."""

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from gobelin.data.buckets import decode
from gobelin.data.captioned_files import SkippedImage, legible
from gobelin.data.indexed_images import IndexedImages, map_in_threads
from gobelin.tokenizer import Tokenizer

LOSES_MUCH = 1 / 3
"""The share of an image that the crop cuts off, from which on it is counted."""
_HASH_SIDE = 8
_THUMBNAIL = 16
_BITS_APART, _LEVELS_APART = 3, 24  # of 64 bits; of 255 levels, in any pixel of the thumbnails
_MOST_COMPARED = 2000  # images that share a quarter of the hash, such as drawings on white: more take too long
_ALPHA, _TURNED, _ANIMATED = "transparent, laid on the background", "turned by EXIF", "animated, first frame taken"
_DEEP, _CMYK, _GREY, _PALETTE = "16 bits or more, scaled to 8", "CMYK, converted", "grey", "palette"
_ORIENTATION = 0x0112
_MOST_REASONS = 20  # that have a line of their own


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """Report on captioned images of a folder or of tars; counts are of those that can be used, at ``size`` pixels.

    ``skipped`` are all that cannot be used, ``reasons`` their number by reason. ``buckets`` counts the images of each
    width×height. ``enlarged`` are smaller than that; ``cropped`` lose more than a third to the crop, and an image loses
    ``cropped_away`` of its area in the mean. ``encodings`` and ``formats`` count images. ``tokens`` are the shortest,
    the median and the longest caption's, of a tokenizer trained on these captions; ``cut`` are captions beyond
    ``max_length`` of them. ``duplicates`` are groups of files with the same bytes, ``near_duplicates`` of images that
    look alike at 8×8, without those.
    """

    images: int
    size: int
    fit: str
    skipped: Sequence[SkippedImage]
    reasons: Mapping[str, int]
    buckets: Mapping[str, int]
    formats: Mapping[str, int]
    encodings: Mapping[str, int]
    widths: tuple[int, float, int]
    heights: tuple[int, float, int]
    aspects: tuple[float, float, float]
    enlarged: tuple[str, ...]
    cropped: tuple[str, ...]
    cropped_away: float
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
        every = {"skipped": [{"name": legible(one.name), "reason": legible(one.reason)} for one in self.skipped]}
        return asdict(replace(self, skipped=())) | every

    def lines(self) -> list[str]:
        """Say it in lines for people: what is fine in one, what to look at in one each."""
        said = [
            f"{self.images:,} captioned images can be used, {len(self.skipped):,} skipped",
            f"sizes: {_range(self.widths)} wide, {_range(self.heights)} high; width : height {_range(self.aspects)}",
            self._trained_at(),
            f"files: {_counted(self.formats)}" + (f"; {_counted(self.encodings)}" if self.encodings else ""),
            f"captions: {self.captions:,}, of which {self.distinct_captions:,} distinct; "
            f"{_range(self.tokens)} tokens; {self.words:,} different words, {self.words_once:,} of them once only",
        ]
        for files, what in (
            (
                self.enlarged,
                f"smaller than {f'{self.size} pixels' if len(self.buckets) == 1 else 'their size'} and enlarged",
            ),
            (self.cropped, "lose more than a third to the crop"),
            (self.cut, f"have captions of more than {self.max_length} tokens, which are cut (tokenizer.max-length)"),
        ):
            if files:
                said.append(f"{len(files):,} images {what}: {_first(files)}")
        for groups, what in ((self.duplicates, "the same file"), (self.near_duplicates, "nearly the same image")):
            if groups:
                count = sum(map(len, groups))
                said.append(f"{count:,} images are {what} as another, in {len(groups):,} groups: {_first(groups[0])}")
        reasons = Counter(self.reasons).most_common()
        said += [f"skipped, {reason}: {count:,}" for reason, count in reasons[:_MOST_REASONS]]
        if len(reasons) > _MOST_REASONS:
            rest = sum(count for _, count in reasons[_MOST_REASONS:])
            said.append(f"skipped for {len(reasons) - _MOST_REASONS:,} other reasons: {rest:,}")
        return said

    def _trained_at(self) -> str:
        """Say at which sizes images are learned, and how they come to them."""
        (first, *others), padded = self.buckets, self.fit == "pad"
        counts = ", ".join(f"{name} ({count:,})" for name, count in self.buckets.items())
        said = f"buckets, width×height: {counts}" if others else f"trained at {first} pixels"
        return said + ("; padded" if padded else f"; an image loses {self.cropped_away:.1%} to the crop in the mean")


def report_folder(
    dataset: IndexedImages,
    vocab_size: int,
    max_length: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> FolderReport:
    """Look at every image and caption of a data set; the tokenizer is trained on them as the training's would be.

    It takes some 2 kB of memory for each image: what looks alike is compared with everything else.
    """
    formats: Counter[str] = Counter()
    encodings: Counter[str] = Counter()
    looks: list[tuple[int, UInt8[np.ndarray, "16 16 3"]]] = []
    names = [legible(name) for name in dataset.names]
    for number, (kind, special, look) in enumerate(map_in_threads(_seen(dataset), range(len(dataset))), start=1):
        formats[kind] += 1
        encodings.update(special)
        looks.append(look)
        advance(number, len(names))
    entries = [dataset.captions(index) for index in range(len(dataset))]
    captions = [caption for entry in entries for caption in entry]
    tokenizer = Tokenizer.train(captions, vocab_size, max_length)
    lengths = {caption: len(tokenizer.tokens(caption)) + 2 for caption in set(captions)}
    words = Counter(word for caption in captions for word in caption.lower().split())
    by_content: defaultdict[bytes, list[str]] = defaultdict(list)
    for name, content in zip(names, dataset.hashes, strict=True):
        by_content[content].append(name)
    duplicates = [group for group in by_content.values() if len(group) > 1]
    repeated = {name for group in duplicates for name in group[1:]}
    alike = [[names[index] for index in group if names[index] not in repeated] for group in _groups_alike(looks)]
    widths, heights = np.asarray(dataset.index.widths), np.asarray(dataset.index.heights)
    losses = dataset.preprocessing.losses(widths, heights)
    return FolderReport(
        images=len(names),
        size=dataset.size,
        fit=dataset.preprocessing.fit,
        skipped=dataset.skipped,
        reasons=dataset.index.reasons,
        buckets=_buckets(dataset),
        formats=dict(formats.most_common()),
        encodings=dict(encodings.most_common()),
        widths=_spread(widths.tolist()),
        heights=_spread(heights.tolist()),
        aspects=_spread((widths / heights).tolist()),
        enlarged=_named(names, (dataset.preprocessing.scales(widths, heights) > 1).tolist()),
        cropped=_named(names, (losses > LOSES_MUCH).tolist()),
        cropped_away=float(losses.mean()),
        captions=len(captions),
        distinct_captions=len(lengths),
        tokens=_spread(list(lengths.values())),
        max_length=max_length,
        cut=_named(names, [any(lengths[one] > max_length for one in entry) for entry in entries]),
        words=len(words),
        words_once=sum(count == 1 for count in words.values()),
        duplicates=tuple(map(tuple, duplicates)),
        near_duplicates=tuple(tuple(group) for group in alike if len(group) > 1),
    )


def _buckets(dataset: IndexedImages) -> dict[str, int]:
    """Count the images of each width×height, of those that have any."""
    counts = np.bincount(dataset.bucket_index, minlength=len(dataset.sizes)).tolist()
    return {f"{width}×{height}": count for (height, width), count in zip(dataset.sizes, counts, strict=True) if count}


def _seen(dataset: IndexedImages) -> Callable[[int], tuple[str, list[str], tuple[int, UInt8[np.ndarray, "16 16 3"]]]]:
    """Make a function that tells of an image: the file's format, what is special in it, and what it looks like."""

    def see(index: int) -> tuple[str, list[str], tuple[int, UInt8[np.ndarray, "16 16 3"]]]:
        content, name = dataset.content(index), dataset.names[index]
        with Image.open(io.BytesIO(content)) as image:
            kind, special = image.format or "?", _encodings(image)
        return kind, special, _look(content, name)

    return see


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


def _look(content: bytes, name: str) -> tuple[int, UInt8[np.ndarray, "16 16 3"]]:
    """Hash what an image looks like (dHash): whether each of 8×8 pixels is lighter than its neighbour; and shrink it.

    The hash finds, and the small image tells: drawings on white have few hashes.
    """
    image = decode(content, name, at_least=(_THUMBNAIL, _THUMBNAIL))
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
