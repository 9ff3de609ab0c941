"""Tensors out of pickles, and nothing else: ``.ckpt`` and ``.bin`` files as PyTorch writes them.

A pickle is a program. This one may call nothing but what stands in for rebuilding a tensor; whatever else it asks for
is refused by name, and no name in it is ever imported. What training frameworks left beside the tensors (their own
classes, numbers of NumPy's) becomes an empty thing that does nothing.
"""

import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gobelin.errors import ModelError
from gobelin.formats.tensor_file import TensorFile

MOST_PROGRAM = 64 * 2**20  # bytes of the pickle itself, beside which the tensors are stored
LONGEST_NAME = 200
MOST_NUMBERS = 33  # in a tensor's offset, sizes and strides

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What trainers leave beside the weights: read past, never imported.
_PASSED_OVER = ("pytorch_lightning.", "lightning.", "numpy.", "_codecs.encode", "torch.device", "torch.Size")


class _Stored(NamedTuple):
    """A tensor's place: the member of the archive, and how it is laid out there."""

    member: str
    dtype: torch.dtype
    numbers: int
    offset: int = 0
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


class PickledFile(TensorFile):
    """The tensors of a file that ``torch.save`` wrote, at its top or under ``state_dict``.

    Raises :class:`ModelError` that names what a pickle asks for beside tensors.
    """

    def __init__(self, path: Path):
        self._archive = _members(path)
        found = _unpickled(path, self._archive)
        if isinstance(inner := found.get("state_dict"), dict):
            found = inner
        self._stored = dict(_named(found))
        if not self._stored:
            raise ModelError(f"{path} holds no tensors by name: expected a checkpoint of weights")
        dtypes = {name: one.dtype for name, one in self._stored.items()}
        super().__init__(path, {name: one.size for name, one in self._stored.items()}, dtypes)

    @contextmanager
    def _mapped(self) -> Iterator[Callable[[str], Tensor]]:
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        yield lambda name: self._tensor(mapped, self._stored[name])

    def _tensor(self, mapped: mmap.mmap, stored: _Stored) -> Tensor:
        if not stored.numbers:
            return torch.empty(stored.size, dtype=stored.dtype)
        start, length = self._archive[stored.member]
        if start + length > len(mapped) or stored.numbers * stored.dtype.itemsize > length:
            raise ModelError(f"{self.path} is shorter than it says: it may be truncated, copy it again")
        flat = torch.frombuffer(mapped, dtype=stored.dtype, count=stored.numbers, offset=start)
        return torch.as_strided(flat, stored.size, stored.stride, stored.offset)


def _named(found: dict[Any, Any]) -> Iterator[tuple[str, _Stored]]:
    """The tensors in nested dictionaries, by their keys with dots between them; three deep, and each walked once."""
    walked = {id(found)}

    def walk(inner: dict[Any, Any], start: str, depth: int) -> Iterator[tuple[str, _Stored]]:
        for key, one in inner.items():
            if not isinstance(key, str):
                continue
            if isinstance(one, _Stored):
                yield start + key, one
            elif isinstance(one, dict) and depth > 1 and id(one) not in walked:
                walked.add(id(one))
                yield from walk(one, f"{start}{key}.", depth - 1)

    return walk(found, "", 3)


def is_pickled(path: Path) -> bool:
    """Whether a file begins as a pickle does, or as the archive that ``torch.save`` puts one into.

    The first eight bytes of a safetensors file are a number, and may be any; the ninth opens a brace.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:] != b"{")


def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Where each member of the archive lies in the file: (start, length) by its name without the top folder."""
    places: dict[str, tuple[int, int]] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ModelError(f"{path}: {info.filename} is compressed, which torch.save never does")
                file.seek(info.header_offset)
                header = file.read(30)
                if len(header) < 30 or header[:4] != b"PK\x03\x04":
                    raise ModelError(f"{path} is a damaged archive: copy it again")
                name_length, extra_length = struct.unpack("<HH", header[26:30])
                start = info.header_offset + 30 + name_length + extra_length
                places[info.filename.partition("/")[2]] = (start, info.file_size)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise ModelError(
            f"{path} is not a whole archive of torch.save's ({error}); files of PyTorch before 1.6 are not read: save "
            "it again, as .safetensors"
        ) from error
    return places


def _unpickled(path: Path, members: dict[str, tuple[int, int]]) -> dict[Any, Any]:
    if "data.pkl" not in members:
        raise ModelError(f"{path} is an archive, but not one of torch.save's: it has no data.pkl")
    start, length = members["data.pkl"]
    if length > MOST_PROGRAM:
        raise ModelError(f"{path}: its pickle is {length:,} bytes long, more than weights need ({MOST_PROGRAM:,})")
    with path.open("rb") as file:
        file.seek(start)
        program = file.read(length)
    try:
        found = _TensorsOnly(BytesIO(program), path, members).load()
    except ModelError:
        raise
    except Exception as error:  # a pickle can fail in any way
        what = type(error).__name__  # what it says can be as long as what it is about
        raise ModelError(f"{path}: its pickle cannot be read ({what}): it may be damaged") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}, expected tensors by name")
    return found


_SETS = (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)


def _with_plain_keys(opcode: bytes, keys: slice) -> Callable[[Any], None]:
    """What an opcode that fills dictionaries does, but for keys that are tuples; ``keys`` of the stack are those."""
    plain = pickle._Unpickler.dispatch[opcode[0]]

    def load(unpickler: Any) -> None:
        if any(isinstance(key, tuple) for key in unpickler.stack[keys]):
            raise ValueError("a tuple as the key of a dictionary")
        plain(unpickler)

    return load


class _TensorsOnly(pickle._Unpickler):
    """An unpickler whose every name is answered from here.

    It is the one that is written in Python, as the other one can be made to take more time and memory than a program is
    long: a memo with a high number becomes a table of that length, and a tuple of tuples, each twice the one before,
    takes two to the power of their number to hash when it is a key.
    """

    dispatch: ClassVar = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _SETS},
        pickle.SETITEM[0]: _with_plain_keys(pickle.SETITEM, slice(-2, -1)),
        pickle.SETITEMS[0]: _with_plain_keys(pickle.SETITEMS, slice(0, None, 2)),
        pickle.DICT[0]: _with_plain_keys(pickle.DICT, slice(0, None, 2)),
    }

    def __init__(self, file: Any, path: Path, members: dict[str, tuple[int, int]]):
        super().__init__(file)
        self._path, self._members = path, members

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"[:LONGEST_NAME]
        if full == "collections.OrderedDict":
            return _Ordered()
        if full == "torch._utils._rebuild_tensor_v2":
            return _Rebuild()
        if full == "torch._utils._rebuild_parameter":
            return _Parameter()
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        if full == "torch.nn.modules.container.ParameterDict":
            return _Parameters
        if full.startswith(_PASSED_OVER):
            return _Nothing
        raise ModelError(f"{self._path} is a pickle that asks for {full}: only tensors are read of one")

    def persistent_load(self, pid: Any) -> _Stored:
        kind, dtype, key, _, numbers = pid
        member = f"data/{key}" if type(key) is str and len(key) <= LONGEST_NAME else ""
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numbers) is not int or numbers < 0:
            raise ModelError(f"{self._path}: its pickle names a storage that is none")
        if member not in self._members:
            raise ModelError(f"{self._path} lacks {member}: it may be truncated, copy it again")
        return _Stored(member, dtype, numbers)


class _Ordered:
    """Stands in for ``collections.OrderedDict``, which ``torch.save`` writes empty, and fills."""

    __slots__ = ()

    def __call__(self, *filling: Any) -> dict[Any, Any]:
        if any(filling):
            raise ValueError("a dictionary filled while it is made")
        return {}


class _Rebuild:
    """Stands in for ``torch._utils._rebuild_tensor_v2``; without attributes, so that nothing can be set on it."""

    __slots__ = ()

    def __call__(
        self, stored: _Stored, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> _Stored:
        numbers = (offset, *size, *stride)
        whole = len(numbers) <= MOST_NUMBERS and all(type(one) is int and 0 <= one < 2**63 for one in numbers)
        if not isinstance(stored, _Stored) or not whole:
            raise ValueError("a tensor of no storage")
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True)) if prod(size) else -1
        if last >= stored.numbers or prod(size) > max(stored.numbers, 1):
            raise ValueError(f"a tensor of {size} in a storage of {stored.numbers} numbers")
        return _Stored(stored.member, stored.dtype, stored.numbers, offset, tuple(size), tuple(stride))


class _Parameter:
    """Stands in for ``torch._utils._rebuild_parameter``: the tensor that it wraps."""

    __slots__ = ()

    def __call__(self, data: _Stored, *_: Any) -> _Stored:
        return data


class _Nothing:
    """Stands in for what is passed over: takes anything, is nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> "_Nothing":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, *_: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass


class _Parameters(dict):
    """Stands in for a ``ParameterDict``, which keeps what it holds in its state."""

    def __setstate__(self, state: Any) -> None:
        held = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(held, dict):
            self.update(held)
