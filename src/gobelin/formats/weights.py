"""Weights: tensors by name, from files and into modules, with errors that name the file and the key."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from gobelin.errors import ModelError
from gobelin.formats.files import read_json, replacing
from gobelin.formats.tensor_file import SafetensorsFile, TensorFile
from gobelin.formats.torch_pickle import PickleFile, archive_members, is_archive, is_pickle

_LONGEST_FILE_NAME = 255  # bytes, of most file systems; longer names would be an OSError


class ShardedFile(TensorFile):
    """Sharded weights: several files of one network, and the index that maps each tensor to its file.

    Raises :class:`ModelError` for an index that names a file elsewhere, or a tensor that its file does not hold.
    """

    def __init__(self, index: Path, allow_pickle: bool = False):
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise ModelError(f"{index} has no weight_map from tensors to files")
        for name in set(where.values()):
            if Path(name).name != name or len(name) > _LONGEST_FILE_NAME:
                raise ModelError(f"{index} names the file {name!r}: expected one in the same folder")
        self._files = {name: open_tensors(index.with_name(name), allow_pickle) for name in sorted(set(where.values()))}
        self._where = where
        if unnamed := sorted(name for file in self._files.values() for name in file.shapes.keys() - where.keys()):
            raise ModelError(f"{index} does not name {unnamed[0]!r}{and_more(unnamed)}, which its files hold")
        if lost := [name for name in where if name not in self._files[where[name]].shapes]:
            raise ModelError(f"{index} looks for {lost[0]!r} in {where[lost[0]]}, where it is not")
        shapes = {name: self._files[where[name]].shapes[name] for name in where}
        super().__init__(index, shapes, {name: self._files[where[name]].dtypes[name] for name in where})

    @contextmanager
    def _mapped(self) -> Iterator[Callable[[str], Tensor]]:
        with ExitStack() as stack:
            files = {name: stack.enter_context(file._mapped()) for name, file in self._files.items()}
            yield lambda name: files[self._where[name]](name)


def open_tensors(path: Path, allow_pickle: bool = False) -> TensorFile:
    """Open a file of tensors, as its first bytes tell and not its name.

    Pickles (``.ckpt``, ``.bin``, ``.pt``) are refused unless ``allow_pickle`` allows them, and then only tensors are
    read from them. Raises :class:`ModelError` that says what the file is.
    """
    if path.is_file() and is_pickle(path):
        if not is_archive(path):
            raise ModelError(
                f"{path} is a pickle of PyTorch before 1.6, or of another program, which is not read: save it again, "
                "as .safetensors"
            )
        if "data.pkl" not in archive_members(path):
            raise ModelError(f"{path} is a ZIP archive of something else than PyTorch's weights: unpack it first")
        if not allow_pickle:
            raise ModelError(
                f"{path} is a pickle, a format that can hold programs: give its .safetensors, or allow it with "
                "allow_pickle (then only tensors are read from it)"
            )
        return PickleFile(path)
    return SafetensorsFile(path)


def read_tensors(file: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read every tensor of a ``.safetensors`` file by its name (:meth:`TensorFile.read`)."""
    return SafetensorsFile(file).read(dtype=dtype)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a ``.safetensors`` file atomically."""
    with replacing(file) as temporary:
        try:
            header = {"format": "pt", **(metadata or {})}  # transformers refuses a file without a format
            temporary.touch()
            mode = temporary.stat().st_mode  # safetensors makes files that only their owner may read
            save_file(_unshared(tensors), temporary, metadata=header)
            temporary.chmod(mode)
        except SafetensorError as error:
            raise ModelError(f"{file} could not be written: {error}") from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors each with memory of its own, as safetensors wants them; tied ones are copied."""
    places: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        place = whole.untyped_storage().data_ptr()
        apart[name] = whole.clone() if place in places else whole
        places.add(place)
    return apart


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: Path, dtype: torch.dtype | None = None) -> None:
    """Load a state dict into ``module``, which may be on the meta device, strict both ways.

    The tensors become the module's own, cast to ``dtype`` or each as it is (None). Raises :class:`ModelError` that
    names ``source`` and the first key that is missing, left over, of another shape, no floating-point numbers, or holds
    NaN or infinity; the module is then as it was.
    """
    expected = module.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ModelError(f"{source} lacks {missing[0]!r}{and_more(missing)}: it does not fit its configuration")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise ModelError(f"{source} holds {extra[0]!r}{and_more(extra)}, which the configuration has no place for")
    for name, parameter in expected.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise ModelError(
                f"{source}: {name!r} is {list(tensor.shape)}, but the configuration says {list(parameter.shape)}"
            )
        if not tensor.is_floating_point():
            raise ModelError(
                f"{source}: {name!r} is of {_dtype_name(tensor.dtype)}: weights quantized to whole numbers are not read"
            )
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor.float()).all():
            why = (
                "the file is damaged, or its training was"
                if tensor.dtype != torch.float16
                else "the file is damaged, or a number was too large for float16"
            )
            raise ModelError(f"{source}: {name!r} holds NaN or infinity: {why}")
    module.load_state_dict({name: tensors[name].to(dtype or tensors[name].dtype) for name in expected}, assign=True)


def _dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype without its module."""
    return str(dtype).removeprefix("torch.")


def and_more(names: list[str]) -> str:
    """Return " (and N more)" for the names after the first, "" where there are none."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def parameter_count(module: nn.Module) -> int:
    """Count the numbers in a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
