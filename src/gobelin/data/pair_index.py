"""Pair index: where each image of a data set lies, its captions, size and hash, in mapped files of any length.

A column is one file: numbers of one type one after the other, or the bytes of texts with the place at which each ends.
``index.json`` names the folder of the columns and is replaced last, so that an index is the old one or the new one.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any, Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from gobelin.data.captioned_files import SkippedImage, legible
from gobelin.data.pair_columns import (
    ColumnFile,
    HashColumn,
    MappedSequence,
    StringColumn,
    StringWriter,
    map_column,
    map_strings,
    string_files,
)
from gobelin.errors import DataError
from gobelin.formats.files import sync_folder, write_json

_FILE = "index.json"
_FORMAT = "gobelin pair index 1"
_TEXTS = ("names", "captions", "shard_names", "skipped_names", "skipped_reasons")
_PER_PAIR = {
    "caption_ends": "<i8",
    "name_keys": "<u8",
    "shards": "<i4",
    "offsets": "<i8",
    "sizes": "<i8",
    "times": "<i8",
    "widths": "<i4",
    "heights": "<i4",
    "hashes": "V32",
}
_PER_SHARD = {"shard_sizes": "<i8", "shard_times": "<i8"}
_COUNTED = {"pairs": _PER_PAIR, "shards": _PER_SHARD}
_BYTES = {name: np.dtype(kind).itemsize for name, kind in (_PER_PAIR | _PER_SHARD).items()}
_ABANDONED = 86_400  # seconds without a write, after which no one writes any more
_MAX_JSON = 10_000_000  # bytes; an index.json has some 1,000
_MAX_REASONS = 1000  # that are counted apart, each in so many characters:
_MAX_REASON, _OTHERS = 200, "other reasons"
NO_SHARD = -1
"""The shard of an image that is a file of its own."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image and its captions: ``name`` relative to the data set, upright size in pixels, SHA-256 of its bytes.

    In a tar, ``shard`` is the tar's number and ``offset`` the byte at which the image begins; a file of its own has
    :data:`NO_SHARD` and 0. ``size`` is in bytes; ``time`` is when the file, or the tar, was changed, in nanoseconds
    since 1970 (``st_mtime_ns``).
    """

    name: str
    captions: tuple[str, ...]
    size: int
    time: int
    width: int
    height: int
    sha256: bytes
    shard: int = NO_SHARD
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tar of images: its name relative to the data set, its size in bytes, and when it was changed (nanoseconds)."""

    name: str
    size: int
    time: int


class SkippedColumn(MappedSequence[SkippedImage]):
    """Read by index which images cannot be used, and why."""

    def __init__(self, names: StringColumn, reasons: StringColumn):
        self._names, self._reasons = names, reasons

    def __len__(self) -> int:
        return len(self._names)

    def at(self, row: int) -> SkippedImage:
        """Read the name and the reason."""
        return SkippedImage(name=self._names[row], reason=self._reasons[row])


class PairIndex(MappedSequence[Pair]):
    """Open the index in a ``folder``, mapped: memory does not grow with the number of pairs.

    ``widths`` and ``heights`` are upright, in pixels; ``digest`` is a SHA-256 over names, captions and hashes, in their
    order; ``reasons`` counts the images that cannot be used; ``options`` are those that the index was made with. Raises
    :class:`DataError` for a folder that has no index, another version's, or a damaged one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        head = _read_head(folder / _FILE)
        try:
            self.digest, self.options = str(head["digest"]), dict(head["options"])
            self.reasons = {str(kind): int(count) for kind, count in head["reasons"].items()}
            columns, counts = folder / Path(head["columns"]).name, {name: int(head[name]) for name in _COUNTED}
            self._columns: dict[str, NDArray[Any]] = {
                name: map_column(columns / name, kind, counts[what])
                for what, kinds in _COUNTED.items()
                for name, kind in kinds.items()
            }
            texts = {name: map_strings(columns / name, head["texts"][name], head["bytes"][name]) for name in _TEXTS}
            if (len(texts["names"]), len(texts["shard_names"])) != tuple(counts.values()):
                raise ValueError(f"it has {len(texts['names']):,} names of {counts['pairs']:,} pairs")
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise DataError(f"the index in {folder} is damaged ({error}): remove it, it is made again") from error
        self.names, self._captions, self._shard_names = (texts[name] for name in _TEXTS[:3])
        self.widths, self.heights = self._columns["widths"], self._columns["heights"]
        self.hashes = HashColumn(self._columns["hashes"])
        self.skipped = SkippedColumn(texts["skipped_names"], texts["skipped_reasons"])
        self._order: NDArray[np.intp] | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.folder,)  # another process maps the files itself

    def __len__(self) -> int:
        return len(self.names)

    def at(self, row: int) -> Pair:
        """Read everything about an image."""
        numbers = {name: int(self._columns[name][row]) for name in _PER_PAIR if name != "hashes"}
        return Pair(
            name=self.names[row],
            captions=self.captions(row),
            size=numbers["sizes"],
            time=numbers["times"],
            width=numbers["widths"],
            height=numbers["heights"],
            sha256=self.hashes[row],
            shard=numbers["shards"],
            offset=numbers["offsets"],
        )

    def captions(self, index: int) -> tuple[str, ...]:
        """Read the captions of an image."""
        row, ends = range(len(self))[index], self._columns["caption_ends"]
        return self._captions[int(ends[row - 1]) if row else 0 : int(ends[row])]

    def place(self, index: int) -> tuple[str, int, int, bool]:
        """Find an image's bytes: (file relative to the data set, offset, length, whether it lies in a tar)."""
        row = range(len(self))[index]
        shard = int(self._columns["shards"][row])
        file = self.names[row] if shard == NO_SHARD else self._shard_names[shard]
        return file, int(self._columns["offsets"][row]), int(self._columns["sizes"][row]), shard != NO_SHARD

    def shards(self) -> list[Shard]:
        """List the tars."""
        sizes, times = self._columns["shard_sizes"].tolist(), self._columns["shard_times"].tolist()
        return [
            Shard(name=name, size=size, time=time)
            for name, size, time in zip(self._shard_names, sizes, times, strict=True)
        ]

    def rows_of(self, shard: int) -> range:
        """Find the pairs of a tar, which follow each other."""
        first, last = np.searchsorted(self._columns["shards"], [shard, shard + 1]).tolist()
        return range(first, last)

    def find(self, name: str) -> Pair | None:
        """Find the pair of a name, if there is one. The first call sorts all names' keys: 8 bytes for each."""
        keys = self._columns["name_keys"]
        if self._order is None:
            self._order = np.argsort(keys)
        wanted = np.uint64(_key(name))
        for at in range(int(np.searchsorted(keys, wanted, sorter=self._order)), len(keys)):
            row = int(self._order[at])
            if keys[row] != wanted:
                return None
            if self.names[row] == name:
                return self[row]
        return None


class PairIndexWriter:
    """Write an index into ``folder`` pair by pair, as a context; what is there stands until the context ends well.

    Nothing of the pairs stays in memory. ``options`` are what else has to be the same for the index to be used again.
    ``sync`` flushes all to disk (fsync), which one that is soon removed does not need. Raises :class:`DataError` where
    nothing can be written.
    """

    def __init__(self, folder: Path, options: Mapping[str, str | None] | None = None, *, sync: bool = True):
        self.folder, self.options, self._sync = folder, dict(options or {}), sync
        self._temporary = folder / f".{uuid4().hex}.tmp"  # processes of two machines may have one number
        self._files = ExitStack()
        self._digest = hashlib.sha256()
        self._reasons: Counter[str] = Counter()

    def __enter__(self) -> Self:
        files = [*_PER_PAIR, *_PER_SHARD, *(file.name for name in _TEXTS for file in string_files(Path(name)))]
        try:
            self._temporary.mkdir(parents=True)
            self._open = {name: self._files.enter_context(ColumnFile(self._temporary / name)) for name in files}
        except OSError as error:
            raise DataError(f"no index can be written in {self.folder}: {error.strerror or error}") from error
        self._texts = {
            name: StringWriter(*(self._open[file.name] for file in string_files(Path(name)))) for name in _TEXTS
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._publish()
        except OSError as error:
            raise DataError(f"the index in {self.folder} cannot be written: {error.strerror or error}") from error
        finally:
            self._files.close()
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __len__(self) -> int:
        return self._texts["names"].count

    def add_shard(self, shard: Shard) -> int:
        """Add a tar; returns its number. Its pairs come before those of the next."""
        self._texts["shard_names"].append(shard.name)
        self._put("shard_sizes", shard.size)
        self._put("shard_times", shard.time)
        return self._texts["shard_names"].count - 1

    def add(self, pair: Pair) -> None:
        """Add a pair."""
        self._texts["names"].append(pair.name)
        for caption in pair.captions:
            self._texts["captions"].append(caption)
        self._put("caption_ends", self._texts["captions"].count)
        self._put("name_keys", _key(pair.name))
        self._put("shards", pair.shard)
        self._put("offsets", pair.offset)
        self._put("sizes", pair.size)
        self._put("times", pair.time)
        self._put("widths", pair.width)
        self._put("heights", pair.height)
        self._open["hashes"].write(pair.sha256)
        self._digest.update(repr((pair.name, pair.captions, pair.sha256.hex())).encode())

    def skip(self, skipped: SkippedImage) -> None:
        """Add an image that cannot be used."""
        self._texts["skipped_names"].append(skipped.name)
        self._texts["skipped_reasons"].append(skipped.reason)
        kind = legible(skipped.kind)[:_MAX_REASON]
        self._reasons[kind if kind in self._reasons or len(self._reasons) < _MAX_REASONS else _OTHERS] += 1

    def _put(self, column: str, value: int) -> None:
        self._open[column].write(value.to_bytes(_BYTES[column], "little", signed=column != "name_keys"))

    def _publish(self) -> None:
        """Give the columns a name that says their content, and then name it in ``index.json``."""
        for file in self._open.values():
            file.finish(self._sync)
        content = hashlib.sha256("".join(file.digest.hexdigest() for file in self._open.values()).encode())
        columns = self.folder / content.hexdigest()[:16]
        if self._sync:
            sync_folder(self._temporary)
        try:
            self._temporary.rename(columns)
        except OSError:
            if not columns.is_dir():  # where there is one, it has the same content
                raise
        head = {
            "format": _FORMAT,
            "columns": columns.name,
            "digest": self._digest.hexdigest(),
            "options": self.options,
            "reasons": dict(self._reasons),
            "pairs": len(self),
            "shards": self._texts["shard_names"].count,
            "texts": {name: text.count for name, text in self._texts.items()},
            "bytes": {name: text.end for name, text in self._texts.items()},
        }
        write_json(self.folder / _FILE, head)  # which flushes the folder too
        for old in self.folder.iterdir():
            if old != columns and (old / "caption_ends").is_file() and not _is_being_written(old):
                shutil.rmtree(old, ignore_errors=True)


def _is_being_written(columns: Path) -> bool:
    """Tell a folder of columns that a process may still write from one that a killed process left behind."""
    return columns.name.startswith(".") and time() - (columns / "caption_ends").stat().st_mtime < _ABANDONED


def _key(name: str) -> int:
    """Hash a name to 64 bits, by which it is looked up."""
    content = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _read_head(file: Path) -> dict[str, Any]:
    """Read ``index.json``."""
    try:
        with file.open("rb") as opened:
            head = json.loads(opened.read(_MAX_JSON))
    except FileNotFoundError:
        raise DataError(f"{file.parent} is no index of pairs: it has no {_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read ({error}): remove it, the index is made again") from error
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise DataError(f"{file} does not say {_FORMAT!r}: name another folder for the index")
    return head
