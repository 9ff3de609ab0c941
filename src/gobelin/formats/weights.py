"""Safetensors files: names and tensors in, names and tensors out, and errors that name the file and the key."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gobelin.errors import ModelError
from gobelin.formats.files import replacing


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a ``.safetensors`` file by its name, on the CPU, in the file's own precision.

    Raises :class:`ModelError` where the file is missing, truncated or not a safetensors file.
    """
    if not file.is_file():
        raise ModelError(f"no weight file at {file}: expected a .safetensors file there")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{file} is not a whole safetensors file ({error}): it may be truncated, copy it again"
        ) from error


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a ``.safetensors`` file: the whole of it, or nothing."""
    with replacing(file) as temporary:
        try:
            # The metadata is what transformers and diffusers expect of a PyTorch file.
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ModelError(f"{file} could not be written: {error}") from error


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Give ``module`` (which may be on the meta device) its weights, strict both ways.

    The tensors become the module's own, cast to the precision of the parameters they replace. Raises
    :class:`ModelError` that names the first key that is missing, left over or of another shape.
    """
    expected = module.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ModelError(f"{source} lacks {missing[0]!r}{_and_more(missing)}: it does not fit its configuration")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise ModelError(f"{source} holds {extra[0]!r}{_and_more(extra)}, which the configuration has no place for")
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            raise ModelError(
                f"{source}: {name!r} is {list(tensors[name].shape)}, but the configuration says {list(parameter.shape)}"
            )
    module.load_state_dict({name: tensors[name].to(p.dtype) for name, p in expected.items()}, assign=True)


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def parameter_count(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())
