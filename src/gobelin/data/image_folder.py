"""Image folder: anyone's captioned images, each opened once before training, so that nothing bad is found later."""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Literal

import numpy as np
from jaxtyping import UInt8

from gobelin.data.buckets import Preprocessing
from gobelin.data.captioned_files import (
    IMAGE_SUFFIXES,
    METADATA_NAMES,
    NO_CAPTION,
    SkippedImage,
    iterate_captioned_files,
)
from gobelin.data.indexed_images import (
    UNREADABLE_FILE,
    Candidate,
    IndexedImages,
    absent,
    inspect_image,
    map_in_threads,
    problem,
    read_file,
)
from gobelin.data.pair_index import NO_SHARD, Pair, PairIndex, PairIndexWriter
from gobelin.errors import DataError


class ImageFolderDataset(IndexedImages):
    """Read a folder of captioned images, with its subfolders, as Hugging Face's "imagefolder" datasets are laid out.

    :func:`~gobelin.data.captioned_files.iterate_captioned_files` says where captions come from; ``caption_column`` is
    that of the metadata. Every image is opened once, after which ``advance`` is called with their number so far and in
    all; unusable ones are listed in ``skipped``. With ``index``, a folder, those whose name, size and time of change
    are as in the run before are not opened again. ``size``, ``buckets``, ``fit`` and ``background`` are those of
    :class:`~gobelin.data.buckets.Preprocessing`; of an animation the first frame counts. Without ``require_captions``
    images that have none are taken too, and their captions are empty. Raises :class:`DataError` for a missing folder,
    broken metadata, or if less than half of the images can be used.
    """

    def __init__(
        self,
        folder: str | Path,
        size: int = 64,
        caption_column: str | None = None,
        advance: Callable[[int, int], None] = lambda done, total: None,
        index: Path | None = None,
        *,
        buckets: bool = False,
        fit: Literal["crop", "pad"] = "crop",
        background: str = "white",
        require_captions: bool = True,
    ):
        self.folder = Path(folder)
        self._column, self._advance, self._require_captions = caption_column, advance, require_captions
        preprocessing = Preprocessing(size=size, buckets=buckets, fit=fit, background=background)
        if not self.folder.is_dir():
            expected = "images with captions" if require_captions else "images"
            raise DataError(f"no folder at {self.folder}: expected {expected} there")
        super().__init__(self.folder, self.folder, preprocessing, index, kind="folder")
        del self._advance  # a progress bar's: it is in no copy that another process gets

    def _fill(self, writer: PairIndexWriter, earlier: PairIndex | None) -> None:
        with tempfile.TemporaryFile("w+", dir=writer.folder, encoding="ascii") as listed:
            total = self._list(writer, listed)
            listed.seek(0)
            found = map_in_threads(partial(self._pair, earlier), _read_list(listed, self.folder))
            for number, one in enumerate(found, start=1):
                if isinstance(one, Pair):
                    writer.add(one)
                else:
                    writer.skip(one)
                self._advance(number, total)

    def _list(self, writer: PairIndexWriter, listed: IO[str]) -> int:
        """Write names and captions to a file, so that their number is known and none stays in memory."""
        total = 0
        for one in iterate_captioned_files(self.folder, self._column):
            if not isinstance(one, SkippedImage):
                name, captions = one.file.relative_to(self.folder).as_posix(), one.captions
            elif one.kind == NO_CAPTION and not self._require_captions:
                name, captions = one.name, ()
            else:
                writer.skip(one)
                continue
            listed.write(json.dumps([name, captions]) + "\n")
            total += 1
        return total

    def _pair(self, earlier: PairIndex | None, one: Candidate) -> Pair | SkippedImage:
        """Take what the earlier index says of an image that is as it was, or open it."""
        known = earlier.find(one.name) if earlier is not None else None
        if known is not None and known.shard == NO_SHARD:
            try:
                said = one.file.stat()
            except OSError:
                return inspect_image(one)
            if (said.st_size, said.st_mtime_ns) == (known.size, known.time):
                return replace(known, captions=one.captions)
        return inspect_image(one)

    def _nothing(self) -> str:
        if not self._require_captions:
            return f"{self.folder} has no images: expected some ({', '.join(IMAGE_SUFFIXES)})"
        return (
            f"{self.folder} has no captioned images: expected {' or '.join(METADATA_NAMES)} with file_name and "
            f"text, or images ({', '.join(IMAGE_SUFFIXES)}) with a .txt caption beside each"
        )


def read_image(file: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Read an image file as uint8 RGB: upright, opaque, scaled, and cropped to the centre square."""
    return Preprocessing(size=size).read(read_file(file), str(file))


def unreadable(file: Path) -> str:
    """Explain in words why an image file cannot be used; an empty string if it can."""
    try:
        return absent(file) or problem(read_file(file))
    except DataError:
        return UNREADABLE_FILE


def _read_list(listed: IO[str], folder: Path) -> Iterator[Candidate]:
    for line in listed:
        name, captions = json.loads(line)
        yield Candidate(name=name, captions=tuple(captions), file=folder / name)
