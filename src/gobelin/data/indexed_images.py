"""Indexed images: captioned images of a folder or of tars, each opened once before training, then read by an index."""

import hashlib
import os
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from gobelin.data.buckets import MAX_IMAGE_BYTES, Preprocessing, decode, upright_size
from gobelin.data.captioned_files import SkippedImage, broken_link, is_besides, legible
from gobelin.data.dataset import CaptionedImage
from gobelin.data.pair_columns import HashColumn, StringColumn
from gobelin.data.pair_index import NO_SHARD, Pair, PairIndex, PairIndexWriter, SkippedColumn
from gobelin.errors import DataError, UsageError
from gobelin.images import MAX_IMAGE_PIXELS

MAX_SKIPPED = 0.5  # a data set with a larger share of unusable images is refused: it is likely the wrong folder
UNREADABLE_FILE = "a file that cannot be read"
_THREADS = min(16, os.cpu_count() or 1)
_WAITING = 4  # images for each thread that are read ahead
_SHOWN = 5  # skipped images in a description
_SMALL = (8, 8)  # pixels: a JPEG is decoded at an eighth, for which all of it is read

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An image that has captions and is still to be opened; in a tar ``size`` bytes lie at ``offset`` of ``file``."""

    name: str
    captions: tuple[str, ...]
    file: Path
    shard: int = NO_SHARD
    offset: int = 0
    size: int = 0
    time: int = 0


class IndexedImages(ABC):
    """Read captioned images by a :class:`~gobelin.data.pair_index.PairIndex`; memory does not grow with their number.

    A subclass lists the images of ``root`` in ``_fill``, to which an earlier index saves work. ``index`` is a folder in
    which that is kept from one run to the next; without one, it is made in a temporary folder. Raises
    :class:`DataError` if less than half of the images can be used.
    """

    def __init__(
        self, root: Path, source: Path, preprocessing: Preprocessing, index: Path | None, **options: str | None
    ):
        self.root, self.source, self.preprocessing = root, source, preprocessing
        folder = _temporary_folder(self) if index is None else index
        earlier = _earlier(folder)
        if earlier is None or not self._is_current(earlier, options):
            with PairIndexWriter(folder, options, sync=index is not None) as writer:
                self._fill(writer, earlier if earlier is not None and earlier.options == options else None)
            earlier = PairIndex(folder)
        self.index = earlier
        self.bucket_index: UInt8[np.ndarray, " images"] = preprocessing.assign(earlier.widths, earlier.heights)
        """The bucket of each image, as its place in ``sizes``."""
        self._refuse_if_mostly_unusable()

    def _is_current(self, earlier: PairIndex, options: dict[str, str | None]) -> bool:
        """Tell whether an earlier index can be used as it is."""
        return False

    @abstractmethod
    def _fill(self, writer: PairIndexWriter, earlier: PairIndex | None) -> None:
        """Write the pairs, and what cannot be used; ``earlier`` was made with the same options."""

    @abstractmethod
    def _nothing(self) -> str:
        """Say in a sentence that there are no captioned images, and what was expected."""

    @property
    def description(self) -> str:
        """One line for people: the number of images, the folder, and the first skipped files."""
        text = f"{len(self):,} captioned images in {self.source}"
        if self.skipped:
            first = ", ".join(f"{legible(skip.name)} ({legible(skip.reason)})" for skip in self.skipped[:_SHOWN])
            more = f" and {len(self.skipped) - _SHOWN:,} more" if len(self.skipped) > _SHOWN else ""
            text += f"; skipped {len(self.skipped):,}: {first}{more}"
        return text

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of what is learned: names, captions, the files' hashes and the preprocessing, wherever they lie."""
        return hashlib.sha256(repr((self.index.digest, self.preprocessing_key)).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Height and width of the images in pixels; with buckets, those of the square."""
        return self.preprocessing.size

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each bucket, in pixels; one without buckets."""
        return self.preprocessing.sizes

    @property
    def preprocessing_key(self) -> str:
        """Everything that decides how the bytes of an image become pixels."""
        return self.preprocessing.key

    @property
    def names(self) -> StringColumn:
        """The name of each image, relative to the folder; in a tar, the tar's name comes first."""
        return self.index.names

    @property
    def hashes(self) -> HashColumn:
        """The SHA-256 of each image file's bytes, 32 bytes."""
        return self.index.hashes

    @property
    def skipped(self) -> SkippedColumn:
        """The images that cannot be used, and the reasons."""
        return self.index.skipped

    def captions(self, index: int) -> tuple[str, ...]:
        """Read the captions of an image, and not the image."""
        return self.index.captions(index)

    def content(self, index: int) -> bytes:
        """Read the bytes of an image's file; raises :class:`DataError` where it is gone."""
        file, offset, size, is_in_tar = self.index.place(index)
        return read_part(self.root / file, offset, size) if is_in_tar else read_file(self.root / file)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> CaptionedImage:
        image = self.preprocessing.read(self.content(index), str(self.source / self.names[index]))
        return CaptionedImage(image=image, captions=self.captions(index))

    def _refuse_if_mostly_unusable(self) -> None:
        """Raise :class:`DataError` for a folder without images, or with too many that cannot be used."""
        unusable = sum(count for reason, count in self.index.reasons.items() if not is_besides(reason))
        found = len(self) + unusable
        if not found:
            raise DataError(self._nothing())
        if unusable > MAX_SKIPPED * found or not len(self):
            raise DataError(f"only {len(self)} of {found} images can be used: {self.description}")


def inspect_image(one: Candidate) -> Pair | SkippedImage:
    """Read an image whole, decode it, and hash its bytes; says in words why one cannot be used."""
    try:
        if one.shard == NO_SHARD:
            said = one.file.stat()  # before it is read: what is changed in between is noticed next time
            one = replace(one, size=said.st_size, time=said.st_mtime_ns)
        if one.size > MAX_IMAGE_BYTES:
            return SkippedImage(name=one.name, reason=f"more than {MAX_IMAGE_BYTES:,} bytes ({one.size:,})")
        content = read_file(one.file) if one.shard == NO_SHARD else read_part(one.file, one.offset, one.size)
    except (OSError, ValueError, DataError):
        return SkippedImage(name=one.name, reason=absent(one.file) or UNREADABLE_FILE)
    if reason := problem(content):
        return SkippedImage(name=one.name, reason=reason)
    width, height = upright_size(content, one.name)
    return Pair(
        name=one.name,
        captions=one.captions,
        size=one.size,
        time=one.time,
        width=width,
        height=height,
        sha256=hashlib.sha256(content).digest(),
        shard=one.shard,
        offset=one.offset,
    )


def problem(content: bytes) -> str:
    """Explain in words why an image file's bytes cannot be used; an empty string if they can."""
    try:
        width, height = upright_size(content, "it")
        if width * height > MAX_IMAGE_PIXELS:
            return f"more than {MAX_IMAGE_PIXELS // 1_000_000} million pixels ({width}×{height})"
        decode(content, "it", at_least=_SMALL)
    except (DataError, UsageError) as error:
        return "truncated" if "truncated" in str(error) else "not a readable image"
    return ""


def absent(file: Path) -> str:
    """Say that there is no file, or a link to none; an empty string where there is one."""
    if file.is_file():
        return ""
    return broken_link(file) if file.is_symlink() else "no such file"


def read_file(file: Path) -> bytes:
    """Read a file; raises :class:`DataError` where it cannot be."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): was it removed?") from error


def read_part(file: Path, offset: int, size: int) -> bytes:
    """Read bytes of a file by their place, in any thread or process at once; raises :class:`DataError`."""
    try:
        with file.open("rb", buffering=0) as opened:
            content = os.pread(opened.fileno(), size, offset)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): was it removed?") from error
    if len(content) < size:
        raise DataError(f"{file} ends before byte {offset + size:,}: it was changed since its index was made")
    return content


def map_in_threads(function: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
    """Apply a function in threads, a few values ahead, and yield the results in the order of what was given."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[Made]] = deque()
        for one in given:
            waiting.append(pool.submit(function, one))
            if len(waiting) > _WAITING * _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _earlier(folder: Path) -> PairIndex | None:
    """Open the index of an earlier run, if there is one; a folder with anything else in it is refused."""
    if folder.is_dir() and not any(not one.name.startswith(".") for one in folder.iterdir()):
        return None
    return PairIndex(folder) if folder.exists() else None


def _temporary_folder(owner: object) -> Path:
    """Make a folder that is removed when its owner goes, by the process that made it."""
    folder = tempfile.mkdtemp(prefix="gobelin-index-")
    process = os.getpid()
    weakref.finalize(owner, lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == process else None)
    return Path(folder)
