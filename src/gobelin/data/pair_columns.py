"""Columns of a pair index: texts and hashes read from mapped files by index, and files that are appended to."""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from gobelin.errors import DataError

Value = TypeVar("Value", covariant=True)
_BUFFER = 1 << 20  # bytes that are written, and hashed, at once


class MappedSequence(Sequence[Value]):
    """Read values by index, or several by a slice; nothing is kept of what was read."""

    @abstractmethod
    def at(self, row: int) -> Value:
        """Read the value of a row, which is there."""

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Value, ...]: ...
    def __getitem__(self, index: int | slice) -> Value | tuple[Value, ...]:
        rows = range(len(self))[index]
        return self.at(rows) if isinstance(rows, int) else tuple(self.at(row) for row in rows)


class StringColumn(MappedSequence[str]):
    """Read texts from a file of UTF-8 bytes, mapped; ``ends`` has the byte at which each ends.

    Names of files that are no UTF-8 are kept as Python has them (``surrogateescape``). Raises :class:`DataError` for
    what is no text.
    """

    def __init__(self, content: NDArray[np.uint8], ends: NDArray[np.int64], name: str):
        self._content, self._ends, self._name = content, ends, name

    def __len__(self) -> int:
        return len(self._ends)

    def at(self, row: int) -> str:
        """Read a text."""
        start, end = int(self._ends[row - 1]) if row else 0, int(self._ends[row])
        try:
            if not 0 <= start <= end <= len(self._content):
                raise ValueError
            return self._content[start:end].tobytes().decode("utf-8", "surrogateescape")
        except ValueError:
            raise DataError(f"{self._name} is damaged at text {row}: remove the index, it is made again") from None


class HashColumn(MappedSequence[bytes]):
    """Read hashes of 32 bytes."""

    def __init__(self, values: NDArray[Any]):
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def at(self, row: int) -> bytes:
        """Read a hash."""
        return self._values[row].tobytes()


class ColumnFile:
    """A file that is appended to, and the SHA-256 of its content; raises :class:`DataError` where a disk is full."""

    def __init__(self, path: Path):
        self.digest = hashlib.sha256()
        self._path = path
        self._file = path.open("wb", buffering=0)
        self._buffer = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> None:
        """Append bytes."""
        self._buffer += content
        if len(self._buffer) >= _BUFFER:
            self._flush()

    def finish(self, sync: bool) -> None:
        """Write what is left, and flush it to disk (fsync) if that is asked for."""
        self._flush()
        if sync:
            os.fsync(self._file.fileno())

    def _flush(self) -> None:
        self.digest.update(self._buffer)
        left, self._buffer = memoryview(self._buffer), bytearray()
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise DataError(f"the index {self._path} cannot be written: {error.strerror or error}") from error


class StringWriter:
    """Append texts to the two files of a :class:`StringColumn`; ``count`` is their number, ``end`` their bytes."""

    def __init__(self, content: ColumnFile, ends: ColumnFile):
        self._content, self._ends = content, ends
        self.count = self.end = 0

    def append(self, text: str) -> None:
        """Append a text."""
        try:
            content = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # half a character, of a name that no file can have
            content = text.encode("utf-8", "backslashreplace")
        self._content.write(content)
        self.count, self.end = self.count + 1, self.end + len(content)
        self._ends.write(self.end.to_bytes(8, "little"))


def string_files(file: Path) -> tuple[Path, Path]:
    """Name the two files of a column of texts: its bytes, and their ends."""
    return file.with_name(f"{file.name}.utf8"), file.with_name(f"{file.name}.ends")


def map_column(file: Path, kind: str, count: int) -> NDArray[Any]:
    """Map a column of ``count`` numbers; raises :class:`ValueError` for a file of another length."""
    expected, found = count * np.dtype(kind).itemsize, file.stat().st_size
    if found != expected:
        raise ValueError(f"{file.name} has {found:,} bytes, expected {expected:,}")
    return np.memmap(file, kind, "r", shape=(count,)) if count else np.empty(0, kind)


def map_strings(file: Path, count: int, size: int) -> StringColumn:
    """Map a column of ``count`` texts that have ``size`` bytes in all; raises as :func:`map_column`."""
    content, ends = string_files(file)
    return StringColumn(map_column(content, "u1", size), map_column(ends, "<i8", count), str(content))
