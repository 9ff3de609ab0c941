"""Files of tensors that are opened before they are read: names, shapes and dtypes first, then the tensors asked for."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gobelin.errors import ModelError
from gobelin.formats.files import refuse_broken_link
from gobelin.formats.foreign_file import refuse_foreign_file

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Bytes mapped at a time while tensors are cast, so that a file and its copy are never both whole in memory.
_PORTION = 256 * 2**20
_LONGEST_NAME = 500  # characters; the longest of any program's have some 130
_MAX_HEADER = 100_000_000  # bytes, as in safetensors


class TensorFile(ABC):
    """A file of tensors, opened but not read: its ``shapes`` and ``dtypes`` by name, and safetensors' ``metadata``."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        metadata: Mapping[str, str] | None = None,
    ):
        if longest := next((name for name in shapes if len(name) > _LONGEST_NAME), ""):
            raise ModelError(
                f"{path} has a tensor whose name has {len(longest):,} characters: it is no file of weights"
            )
        self.path, self.shapes, self.dtypes, self.metadata = path, shapes, dtypes, metadata or {}

    def read(self, names: Iterable[str] | None = None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Read these tensors (None: all) onto the CPU, floating ones cast to ``dtype`` (None: the file's own).

        Tensors that are not cast stay mapped from the file, without a copy.
        """
        tensors: dict[str, Tensor] = {}
        left = list(self.shapes if names is None else names)[::-1]
        while left:
            mapped = 0
            with self._mapped() as tensor_of:  # anew for each portion: what was cast is then unmapped
                while left and mapped < _PORTION:
                    name = left.pop()
                    tensor = tensor_of(name)
                    tensors[name] = _cast_floats(tensor, dtype)
                    if tensors[name] is not tensor:
                        mapped += tensor.nbytes
        return tensors

    @abstractmethod
    def _mapped(self) -> AbstractContextManager[Callable[[str], Tensor]]:
        """Map the file into memory while the block runs; yields a function from names to tensors."""


class SafetensorsFile(TensorFile):
    """A ``.safetensors`` file; raises :class:`ModelError` where there is none, or not a whole one."""

    def __init__(self, path: Path):
        refuse_broken_link(path)
        if not path.is_file():
            raise ModelError(f"no weight file at {path}: expected a .safetensors file there")
        with _open_safetensors(path) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            for name, part in parts.items():
                if part.get_dtype() not in _SAFETENSORS_DTYPES:
                    raise ModelError(f"{path}: {name!r} is stored as {part.get_dtype()}, which Gobelin does not read")
            dtypes = {name: _SAFETENSORS_DTYPES[part.get_dtype()] for name, part in parts.items()}
            super().__init__(path, shapes, dtypes, file.metadata())

    @contextmanager
    def _mapped(self) -> Iterator[Callable[[str], Tensor]]:
        with _open_safetensors(self.path) as file:
            yield file.get_tensor


def _cast_floats(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast a floating tensor to ``dtype``; whole numbers, and all for ``dtype`` None, stay as they are."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


@contextmanager
def _open_safetensors(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file; what is wrong with it becomes a :class:`ModelError`."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        refuse_foreign_file(path)
        raise ModelError(f"{path} is not a whole safetensors file: {_describe_damage(path, error)}") from error


def _describe_damage(path: Path, error: Exception) -> str:
    """Describe what is wrong with a safetensors file, by its length and that of its header's; else as ``error`` does.

    The format: eight bytes, the length n of the header; n bytes of JSON; the tensors, whose offsets the header gives.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            return f"its header would be {length:,} bytes long, and it has {size:,}: it was cut, or is no such file"
        try:
            header = json.loads(file.read(length))
            ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError):
            return f"its header cannot be read ({error})"
    if expected > size:
        return f"it has {size:,} bytes of the {expected:,} that its header says: it was cut, copy or download it again"
    if expected < size:
        return f"{size - expected:,} bytes follow its last tensor, which its header does not know: it is damaged"
    return f"its header contradicts itself ({error})"
