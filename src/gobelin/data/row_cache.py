"""Row cache: rows of tensors on disk, found by the hash of what they were computed from.

A row is computed once for each content (an image file's bytes, a caption) and each ``folder``, whose name says with
which model and preprocessing. Rows lie in safetensors shards and are read one by one, without mapping the shard, so
that memory does not grow with their number.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from gobelin.errors import DataError
from gobelin.formats.files import replacing

Hashes: TypeAlias = Shaped[np.ndarray, " rows"]
HASH_BYTES = 16
"""Bytes of a row's hash: among 10 million rows, two have the same one with a chance of 10⁻²⁵."""
_HASHES, _CHECKSUMS = "hashes", "checksums"
_SHARD_BYTES = 64 * 2**20  # of a shard: so much is computed again after a kill
_COMPUTED_TOGETHER = 64  # rows: a batch for a network, and what is held in memory
_DTYPES = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000  # bytes; a shard's header has some 300


def content_hash(*parts: bytes | str) -> bytes:
    """Hash what a row is computed from: the first 16 bytes of a SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()[:HASH_BYTES]


def hash_array(hashes: Iterable[bytes]) -> Hashes:
    """Join hashes into an array of 16 bytes each."""
    return np.fromiter(hashes, f"V{HASH_BYTES}")


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A tensor of a shard: where its rows begin in the file, and what each is."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class _Shard:
    """A shard's file, its tensors, and how many rows each has."""

    path: Path
    columns: dict[str, _Column]
    rows: int

    def read(self, row: int) -> dict[str, Tensor]:
        """Read a row of every tensor. The file is opened anew, so that any number of shards and of threads may be.

        Raises :class:`DataError` for a row whose bytes are not those that were written.
        """
        rows: dict[str, Tensor] = {}
        with self.path.open("rb", buffering=0) as file:
            for name, column in self.columns.items():
                content = os.pread(file.fileno(), column.row_bytes, column.start + row * column.row_bytes)
                if len(content) < column.row_bytes:
                    raise DataError(f"{self.path} is cut off: remove it, its rows are computed again")
                rows[name] = torch.frombuffer(bytearray(content), dtype=column.dtype).reshape(column.shape)
        if rows.pop(_CHECKSUMS).item() != _checksum(rows):
            raise DataError(f"{self.path} was altered: remove it, its rows are computed again")
        return rows


class RowCache:
    """Open the rows in a ``folder``, which may be new; raises :class:`DataError` for a shard that is not whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.refresh()

    def refresh(self) -> None:
        """Look for shards that were written since, by this process or another."""
        self._shards: list[_Shard] = []
        hashes: list[Hashes] = [np.empty(0, f"V{HASH_BYTES}")]
        for path in sorted(self.folder.glob("*.safetensors")):
            shard, of_rows = _open_shard(path)
            self._shards.append(shard)
            hashes.append(of_rows)
        self._ends = np.cumsum([shard.rows for shard in self._shards], dtype=np.int64)
        joined = np.concatenate(hashes)
        # Of all that memory holds for a row: its hash, in order, and its number, counted through all shards.
        self._numbers = np.argsort(joined, kind="stable").astype(np.uint32 if len(joined) < 2**32 else np.int64)
        self._hashes = joined[self._numbers]

    def __len__(self) -> int:
        """Count the rows, each content once: two processes may have written the same."""
        return int((self._hashes[1:] != self._hashes[:-1]).sum()) + (len(self._hashes) > 0)

    def missing(self, hashes: Hashes) -> Int[np.ndarray, " missing"]:
        """List the positions in ``hashes`` of rows that are not there, each content once."""
        absent = np.flatnonzero(~self._find(hashes)[1])
        return np.sort(absent[np.unique(hashes[absent], return_index=True)[1]])

    def append(self, hashes: Hashes, parts: Iterable[dict[str, Tensor]]) -> None:
        """Write a shard, part by part: tensors by name, whose first axes add up to as many rows as ``hashes``.

        Raises :class:`DataError` for a number that is not finite. A killed process leaves no half-written shard.
        """
        name = hashlib.sha256(hashes.tobytes()).hexdigest()[:32]
        with replacing(self.folder / f"{name}.safetensors") as temporary:
            _write_shard(temporary, hashes, parts)

    def read(self, hashes: Hashes) -> dict[str, Shaped[Tensor, "rows ..."]]:
        """Read rows by their hashes; all must be there, and of one shape."""
        at, found = self._find(hashes)
        if not found.all():
            raise DataError(f"{self.folder} lacks {int((~found).sum())} of {len(hashes)} rows: was it changed?")
        numbers = self._numbers[at].astype(np.int64)
        shards = np.searchsorted(self._ends, numbers, side="right")
        within = numbers - self._ends[shards] + [self._shards[shard].rows for shard in shards]
        rows = [self._shards[shard].read(row) for shard, row in zip(shards.tolist(), within.tolist(), strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _find(self, hashes: Hashes) -> tuple[Int[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """Find rows: (where each would stand among all hashes in order, whether it is there)."""
        if not len(self._hashes):
            return np.zeros(len(hashes), np.int64), np.zeros(len(hashes), bool)
        at = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        return at, self._hashes[at] == hashes


def fill(
    cache: RowCache,
    hashes: Hashes,
    compute: Callable[[Int[np.ndarray, " rows"]], dict[str, Tensor]],
    *,
    share: slice = slice(None),
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compute the rows that a cache lacks, some at a time: ``compute`` is given positions in ``hashes``.

    ``share`` selects what this process computes; the rest is left to other processes. What was written before a run
    was killed is not computed again. ``advance`` is called with the rows done and all of them.
    """
    missing = cache.missing(hashes)
    # By their place among all: another process may have written some of them by now, and may look at other rows.
    missing = missing[np.isin(missing, np.arange(len(hashes))[share])]
    done = 0

    def compute_next() -> dict[str, Tensor]:
        nonlocal done
        part = missing[done : done + _COMPUTED_TOGETHER]
        computed = compute(part)
        done += len(part)
        advance(done, len(missing))
        return computed

    while (start := done) < len(missing):
        first = compute_next()
        together = max(1, _SHARD_BYTES // sum(tensor.nbytes for tensor in first.values()))
        shard = missing[start : start + together * _COMPUTED_TOGETHER]
        more = math.ceil(len(shard) / _COMPUTED_TOGETHER) - 1
        cache.append(hashes[shard], chain([first], (compute_next() for _ in range(more))))
    cache.refresh()


def _checksum(row: dict[str, Tensor]) -> int:
    """Compute the CRC-32 of a row's tensors, with their names, types and shapes."""
    total = 0
    for name, tensor in sorted(row.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.numpy().tobytes(), total)
    return total


def _write_shard(path: Path, hashes: Hashes, parts: Iterable[dict[str, Tensor]]) -> None:
    """Write the safetensors file of a shard (:func:`_open_shard`), of which one part at a time is in memory."""
    columns: dict[str, _Column] = {}
    done = 0
    with path.open("wb") as file:
        for part in parts:
            for name, tensor in part.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise DataError(f"{name} to cache in {path.parent} are not finite: the model that made them is not")
            count = len(next(iter(part.values())))
            sums = [_checksum({name: tensor[row] for name, tensor in part.items()}) for row in range(count)]
            written = {**part, _CHECKSUMS: torch.tensor(sums)}
            if not columns:
                stored = torch.frombuffer(bytearray(hashes.tobytes()), dtype=torch.uint8).reshape(-1, HASH_BYTES)
                columns = _write_header(file, len(hashes), {**written, _HASHES: stored})
                file.seek(columns[_HASHES].start)
                file.write(hashes.tobytes())
            for name, tensor in written.items():
                file.seek(columns[name].start + done * columns[name].row_bytes)
                file.write(tensor.contiguous().numpy().tobytes())
            done += count
    assert done == len(hashes)


def _write_header(file: BinaryIO, rows: int, example: dict[str, Tensor]) -> dict[str, _Column]:
    """Write the header of tensors that have each ``rows`` such rows as the example; returns where each begins."""
    columns, header, end = {}, {}, 0
    for name, tensor in example.items():
        column = _Column(start=end, shape=tuple(tensor.shape[1:]), dtype=tensor.dtype)
        end += rows * column.row_bytes
        columns[name] = column
        header[name] = {
            "dtype": _DTYPE_NAMES[column.dtype],
            "shape": [rows, *column.shape],
            "data_offsets": [column.start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: replace(column, start=8 + len(text) + column.start) for name, column in columns.items()}


def _open_shard(path: Path) -> tuple[_Shard, Hashes]:
    """Read a shard's header and hashes: safetensors is 8 bytes of length, JSON of that length, then the tensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length < _MAX_HEADER:
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            columns = {
                name: _Column(
                    start=8 + length + entry["data_offsets"][0],
                    shape=tuple(entry["shape"][1:]),
                    dtype=_DTYPES[entry["dtype"]],
                )
                for name, entry in header.items()
            }
            rows = header[_HASHES]["shape"][0]
            if (columns[_CHECKSUMS].shape, columns[_CHECKSUMS].dtype) != ((), torch.int64):
                raise ValueError("its checksums are no column of numbers")
            ends = [8 + length, *sorted(column.start + rows * column.row_bytes for column in columns.values())]
            if ends != [*sorted(column.start for column in columns.values()), path.stat().st_size]:
                raise ValueError("its length is not what its header says")
            file.seek(columns[_HASHES].start)
            hashes = np.frombuffer(file.read(rows * HASH_BYTES), f"V{HASH_BYTES}")
    except (OSError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it, its rows are computed again") from error
    del columns[_HASHES]
    return _Shard(path=path, columns=columns, rows=rows), hashes
