"""Restricted unpickler: read tensors, and nothing else, from ``.ckpt`` and ``.bin`` files as PyTorch writes them.

A pickle is a program. Here it can call only the stand-ins for rebuilding a tensor; every other name is refused by name,
and no name in it is ever imported. What training frameworks left beside the tensors (their own classes, NumPy's
numbers) becomes an empty object that does nothing.
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

_MAX_PICKLE_BYTES = 4 * 2**20  # tensors lie beside it: for the 1,130 of Stable Diffusion 1.5 it has 180 KB
_MAX_SHARING = 4  # times: tied weights share a storage, and no more
_MAX_NAME_LENGTH = 200  # torch's own names are far shorter; longer ones would only swell the error that quotes them
_MAX_LAYOUT_NUMBERS = 33  # an offset, and sizes and strides of 16 dimensions: weights have 4 at most

# By the name of the storage class that a pickle asks for.
_STORAGE_DTYPES = {
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
    "UntypedStorage": torch.uint8,  # bytes, of which _rebuild_tensor_v3 makes numbers of later dtypes
}
_LATER_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
# What trainers leave beside the weights: replaced by an empty object, never imported.
_IGNORED_CLASSES = ("pytorch_lightning.", "lightning.", "numpy.", "_codecs.encode", "torch.device", "torch.Size")


class _StoredTensor(NamedTuple):
    """The place of a tensor in the archive: its member, and its layout there, in numbers and not in bytes."""

    member: str
    dtype: torch.dtype
    numbers: int
    offset: int = 0
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


class PickleFile(TensorFile):
    """A file that ``torch.save`` wrote, with its tensors at the top or under ``state_dict``, mapped and not copied.

    Raises :class:`ModelError` that names the first class or function, other than tensors', that the pickle asks for.
    """

    def __init__(self, path: Path):
        self._archive = archive_members(path)
        found = _unpickle(path, self._archive)
        if isinstance(inner := found.get("state_dict"), dict):
            found = inner
        self._stored = dict(_walk_tensors(found))
        if not self._stored:
            raise ModelError(f"{path} holds no tensors by name: expected a checkpoint of weights")
        dtypes = {name: one.dtype for name, one in self._stored.items()}
        described = sum(prod(one.size) * one.dtype.itemsize for one in self._stored.values())
        if described > _MAX_SHARING * path.stat().st_size:
            raise ModelError(f"{path} describes {described:,} bytes of tensors, and holds {path.stat().st_size:,}")
        super().__init__(path, {name: one.size for name, one in self._stored.items()}, dtypes)

    @contextmanager
    def _mapped(self) -> Iterator[Callable[[str], Tensor]]:
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        yield lambda name: self._tensor(mapped, self._stored[name])

    def _tensor(self, mapped: mmap.mmap, stored: _StoredTensor) -> Tensor:
        if not stored.numbers:
            return torch.empty(stored.size, dtype=stored.dtype)
        start, length = self._archive[stored.member]
        if start + length > len(mapped) or stored.numbers * stored.dtype.itemsize > length:
            raise ModelError(f"{self.path} is shorter than it says: it may be truncated, copy it again")
        flat = torch.frombuffer(mapped, dtype=stored.dtype, count=stored.numbers, offset=start)
        return torch.as_strided(flat, stored.size, stored.stride, stored.offset)


def _walk_tensors(found: dict[Any, Any]) -> Iterator[tuple[str, _StoredTensor]]:
    """Yield the tensors in nested dictionaries, their keys joined by dots; three levels deep, each dictionary once."""
    walked = {id(found)}  # dictionaries that hold one another would be walked 10¹² times

    def walk(inner: dict[Any, Any], start: str, depth: int) -> Iterator[tuple[str, _StoredTensor]]:
        for key, one in inner.items():
            if not isinstance(key, str):
                continue
            if isinstance(one, _StoredTensor):
                yield start + key, one
            elif isinstance(one, dict) and depth > 1 and id(one) not in walked:
                walked.add(id(one))
                yield from walk(one, f"{start}{key}.", depth - 1)

    return walk(found, "", 3)  # weights nest two levels deep at most: AUTOMATIC1111's textual inversions


def is_archive(path: Path) -> bool:
    """Recognise a ZIP archive, which ``torch.save`` writes since PyTorch 1.6, by its first four bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def is_pickle(path: Path) -> bool:
    """Recognise a pickle, or the archive that ``torch.save`` puts one into, by the first nine bytes of a file.

    A safetensors file begins with a number of eight bytes, which may be any, and an opening brace.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:] != b"{")


def archive_members(path: Path) -> dict[str, tuple[int, int]]:
    """Locate each member of the archive in the file: (start, length) in bytes, by its name without the top folder."""
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
            f"{path} is not a whole archive of torch.save's ({error}): copy or download it again"
        ) from error
    return places


def _unpickle(path: Path, members: dict[str, tuple[int, int]]) -> dict[Any, Any]:
    """Run the pickle of an archive with the restricted unpickler; tensors become their places."""
    if "data.pkl" not in members:
        raise ModelError(f"{path} is an archive, but not one of torch.save's (it has no data.pkl): unpack it first")
    start, length = members["data.pkl"]
    if length > _MAX_PICKLE_BYTES:
        raise ModelError(f"{path}: its pickle is {length:,} bytes long, more than weights need ({_MAX_PICKLE_BYTES:,})")
    with path.open("rb") as file:
        file.seek(start)
        program = file.read(length)
        order_at, order_length = members.get("byteorder", (0, 0))
        file.seek(order_at)
        if order_length and file.read(min(order_length, 8)) != b"little":
            raise ModelError(f"{path} was written on a machine with another order of bytes, which is not read")
    try:
        found = _RestrictedUnpickler(BytesIO(program), path, members).load()
    except ModelError:
        raise
    except Exception as error:  # a pickle can fail in any way
        kind = type(error).__name__  # the message can be as long as the pickle
        raise ModelError(f"{path}: its pickle cannot be read ({kind}): it may be damaged") from error
    if not isinstance(found, dict):
        kind = "tensor" if isinstance(found, _StoredTensor) else type(found).__name__
        raise ModelError(f"{path} holds a {kind}, expected tensors by name")
    return found


_SET_OPCODES = (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)


def _load_empty_set(unpickler: Any) -> None:
    """Stand-in for the opcode of an empty set: an object that nothing can be added to."""
    unpickler.append(_IgnoredObject())


def _is_small(key: Any) -> bool:
    """Tell whether a key is a number as an optimizer's state has them."""
    return type(key) is int and abs(key) < 2**31


def _refuse_other_keys(opcode: bytes, keys: slice) -> Callable[[Any], None]:
    """Wrap an opcode that fills dictionaries to refuse other keys (at ``keys`` of the stack) than text and numbers."""
    original = pickle._Unpickler.dispatch[opcode[0]]

    def load(unpickler: Any) -> None:
        # Numbers may share one hash, and a tuple's takes time: either makes a dictionary slow.
        if any(not isinstance(key, str) and not _is_small(key) for key in unpickler.stack[keys]):
            raise ValueError("a key of a dictionary that is no text and no small number")
        original(unpickler)

    return load


class _RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that resolves every name to a stand-in of this module.

    It extends the unpickler in Python, because a short pickle can make the one in C take any time and memory: a memo
    with a high number becomes a table of that length, and a key that is a tuple of two tuples, and so on n deep, takes
    2ⁿ steps to hash (docs/decisions.md, "A pickle is read, never loaded").
    """

    dispatch: ClassVar = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _SET_OPCODES},
        pickle.EMPTY_SET[0]: _load_empty_set,
        pickle.SETITEM[0]: _refuse_other_keys(pickle.SETITEM, slice(-2, -1)),
        pickle.SETITEMS[0]: _refuse_other_keys(pickle.SETITEMS, slice(0, None, 2)),
        pickle.DICT[0]: _refuse_other_keys(pickle.DICT, slice(0, None, 2)),
    }

    def __init__(self, file: Any, path: Path, members: dict[str, tuple[int, int]]):
        super().__init__(file)
        self._path, self._members = path, members

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"[:_MAX_NAME_LENGTH]
        if full == "collections.OrderedDict":
            return _OrderedDict()
        if full == "torch._utils._rebuild_tensor_v2":
            return _RebuildTensor()
        if full == "torch._utils._rebuild_tensor_v3":
            return _RebuildLaterTensor()
        if module == "torch" and name in _LATER_DTYPES:
            return _LATER_DTYPES[name]
        if full == "torch._utils._rebuild_parameter":
            return _RebuildParameter()
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if full in ("__builtin__.set", "builtins.set"):
            return _EmptySet()
        if full == "torch.nn.modules.container.ParameterDict":
            return _ParameterDict
        if full.startswith(_IGNORED_CLASSES):
            return _IgnoredObject
        raise ModelError(f"{self._path} is a pickle that asks for {full}: only tensors are read from pickles")

    def persistent_load(self, pid: Any) -> _StoredTensor:
        kind, dtype, key, _, numbers = pid
        member = f"data/{key}" if type(key) is str and len(key) <= _MAX_NAME_LENGTH else ""
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numbers) is not int or numbers < 0:
            raise ModelError(f"{self._path}: its pickle describes a storage that does not exist")
        if member not in self._members:
            raise ModelError(f"{self._path} lacks {member}: it may be truncated, copy it again")
        return _StoredTensor(member, dtype, numbers)


class _OrderedDict:
    """Stand-in for ``collections.OrderedDict``, which ``torch.save`` creates empty, then fills."""

    __slots__ = ()

    def __call__(self, *filling: Any) -> dict[Any, Any]:
        if any(filling):
            raise ValueError("a dictionary filled while it is made")
        return {}


class _EmptySet:
    """Stand-in for ``set``, which every ``torch.nn.Module`` holds an empty one of: nothing is ever in it."""

    __slots__ = ()

    def __call__(self, *filling: Any) -> "_IgnoredObject":
        if any(filling):
            raise ValueError("a set that is not empty")
        return _IgnoredObject()


class _RebuildTensor:
    """Stand-in for ``torch._utils._rebuild_tensor_v2``: checks the layout; no attributes, so that none can be set."""

    __slots__ = ()

    def __call__(
        self, stored: _StoredTensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any
    ) -> _StoredTensor:
        if any(isinstance(one, dict) and one for one in more):
            raise ValueError("a tensor that is stored negative or conjugate")
        numbers = (offset, *size, *stride)
        whole = len(numbers) <= _MAX_LAYOUT_NUMBERS and all(type(one) is int and 0 <= one < 2**63 for one in numbers)
        if not isinstance(stored, _StoredTensor) or not whole:
            raise ValueError("a tensor of no storage")
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True)) if prod(size) else -1
        if last >= stored.numbers or prod(size) > max(stored.numbers, 1):
            raise ValueError(f"a tensor of {size} in a storage of {stored.numbers} numbers")
        return _StoredTensor(stored.member, stored.dtype, stored.numbers, offset, tuple(size), tuple(stride))


class _RebuildLaterTensor:
    """Stand-in for ``torch._utils._rebuild_tensor_v3``, whose storage is bytes and whose dtype comes last."""

    __slots__ = ()

    def __call__(
        self, stored: _StoredTensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any
    ) -> _StoredTensor:
        dtype = more[2] if len(more) > 2 else None  # after requires_grad and hooks
        if not isinstance(stored, _StoredTensor) or dtype not in _LATER_DTYPES.values():
            raise ValueError("a tensor of no known dtype")
        return _RebuildTensor()(stored._replace(dtype=dtype), offset, size, stride)  # a byte a number


class _RebuildParameter:
    """Stand-in for ``torch._utils._rebuild_parameter``: returns the tensor that it would wrap."""

    __slots__ = ()

    def __call__(self, data: _StoredTensor, *_: Any) -> _StoredTensor:
        return data


class _IgnoredObject:
    """Stand-in for the classes of training frameworks: takes any arguments and does nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> "_IgnoredObject":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, *_: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass


class _ParameterDict(dict):
    """Stand-in for ``torch.nn.ParameterDict``, which keeps its tensors in its state."""

    def __setstate__(self, state: Any) -> None:
        held = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(held, dict):
            self.update(held)
