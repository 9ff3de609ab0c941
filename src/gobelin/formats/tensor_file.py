"""Files of tensors that are opened before they are read: names, shapes and dtypes first, then the tensors asked for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gobelin.errors import ModelError

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Bytes mapped at a time while tensors are cast, so that a file and its copy are never both whole in memory.
_PORTION = 256 * 2**20


class TensorFile(ABC):
    """A file of tensors, opened but not read: its ``shapes`` and ``dtypes`` by name, and safetensors' ``metadata``."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path, self.shapes, self.dtypes, self.metadata = path, shapes, dtypes, metadata or {}

    def float_dtype(self, names: Iterable[str] | None = None) -> torch.dtype:
        """Return the one floating dtype of these tensors (None: all); float32 where there are none or several."""
        found = {self.dtypes[name] for name in (self.dtypes if names is None else names)}
        floating = {dtype for dtype in found if dtype.is_floating_point}
        return next(iter(floating)) if len(floating) == 1 else torch.float32

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
        if not path.is_file():
            raise ModelError(f"no weight file at {path}: expected a .safetensors file there")
        with _open_safetensors(path) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            dtypes = {name: _SAFETENSORS_DTYPES.get(part.get_dtype(), torch.float32) for name, part in parts.items()}
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
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}): it may be truncated, copy it again"
        ) from error
