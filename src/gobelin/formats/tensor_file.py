"""A file of tensors that is opened but not read, and the one kind that everybody writes: safetensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gobelin.errors import ModelError

_DTYPES = {
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
_PORTION = 256 * 2**20  # bytes of a file that are mapped at a time while they are cast


class TensorFile(ABC):
    """A file of tensors that is opened but not read: what is in it is known by name and shape.

    ``metadata`` is what a safetensors file says of itself.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path, self.shapes, self.dtypes, self.metadata = path, shapes, dtypes, metadata or {}

    def precision(self, names: Iterable[str] | None = None) -> torch.dtype:
        """That of these tensors' numbers with fractions, or of all; float32 where there are several."""
        found = {self.dtypes[name] for name in (self.dtypes if names is None else names)}
        fractions = {dtype for dtype in found if dtype.is_floating_point}
        return next(iter(fractions)) if len(fractions) == 1 else torch.float32

    def read(self, names: Iterable[str] | None = None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """These tensors, or all, on the CPU: those with fractions in ``dtype``, or in the file's own precision.

        What is not cast is mapped, not copied.
        """
        tensors: dict[str, Tensor] = {}
        left = list(self.shapes if names is None else names)[::-1]
        while left:
            mapped = 0
            with self._mapped() as tensor_of:  # anew for each portion: what was cast is then unmapped
                while left and mapped < _PORTION:
                    name = left.pop()
                    tensor = tensor_of(name)
                    tensors[name] = cast(tensor, dtype)
                    if tensors[name] is not tensor:
                        mapped += tensor.nbytes
        return tensors

    @abstractmethod
    def _mapped(self) -> AbstractContextManager[Callable[[str], Tensor]]:
        """What gives a tensor of the file by its name, for a while."""


class SafetensorsFile(TensorFile):
    """A ``.safetensors`` file; :class:`ModelError` where there is none, or not a whole one."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise ModelError(f"no weight file at {path}: expected a .safetensors file there")
        with _opened(path) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            dtypes = {name: _DTYPES.get(part.get_dtype(), torch.float32) for name, part in parts.items()}
            super().__init__(path, shapes, dtypes, file.metadata())

    @contextmanager
    def _mapped(self) -> Iterator[Callable[[str], Tensor]]:
        with _opened(self.path) as file:
            yield file.get_tensor


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in ``dtype``, or as it is: where that is None, and where it holds whole numbers."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file; what is wrong with it becomes a :class:`ModelError`."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}): it may be truncated, copy it again"
        ) from error
