"""A component of a diffusers folder: one network, its ``config.json`` and its weights."""

import dataclasses
import math
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from gobelin.errors import ModelError, UsageError
from gobelin.formats.files import read_json, write_json
from gobelin.formats.weights import Shards, TensorFile, load_into, open_tensors, write_tensors

DIFFUSERS_VERSION = "0.35.0"  # the version whose folder layout is written

Config = TypeVar("Config")


def config_from_json(config_class: type[Config], content: dict[str, Any], source: Path) -> Config:
    """Read a frozen dataclass from a config file's fields.

    Fields that the dataclass lacks are ignored, except those in its ``fixed`` table, which must have the one
    value that it allows. Raises :class:`ModelError` for anything this code could not compute as meant.
    """
    known = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    for name, only in getattr(config_class, "fixed", {}).items():
        if content.get(name, only) != only:
            raise ModelError(f"{source}: {name} is {content[name]!r}, and only {only!r} is supported")
    required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in content]:
        raise ModelError(f"{source} lacks the field {missing[0]!r}")
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items() if name in known
    }
    hints = get_type_hints(config_class)
    for name, value in values.items():
        if not _is_of(value, hints[name]):
            raise ModelError(f"{source}: {name} is {content[name]!r}: {_wanted(hints[name])}")
    try:
        return config_class(**values)
    except (UsageError, TypeError) as error:
        raise ModelError(f"{source}: {error}") from error


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a field's type; numbers are finite ones."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(_is_of(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(one, inner[0]) for one in value)
    if hint is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return type(value) is hint


def _wanted(hint: Any) -> str:
    """What a field takes, in words."""
    if get_origin(hint) is Literal:
        return f"the choices are {', '.join(map(str, get_args(hint)))}"
    return f"expected {hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint}"


def require_counts(config: Any, *names: str) -> None:
    """Raise :class:`UsageError` for the first of these fields that is not a whole number of 1 or more."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise UsageError(f"{name} is {value!r}: give a whole number of 1 or more")


def require_choices(config: Any) -> None:
    """Raise :class:`UsageError` for the first field that is not one of the choices of its ``Literal`` type."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            raise UsageError(
                f"{name} is {getattr(config, name)!r}: the choices are {', '.join(map(str, get_args(hint)))}"
            )


class Component(nn.Module, Generic[Config]):
    """A network with a frozen ``config``, that reads and writes itself as a component folder."""

    config_class: ClassVar[type]
    class_name: ClassVar[str]  # as diffusers or transformers call it
    weights_name: ClassVar[str]

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
        allow_pickle: bool = False,
    ) -> Self:
        """Read ``config.json`` and the weights beside it, whole or in shards; ``dtype`` None is the file's own.

        ``variant`` ("fp16") picks the files of that name, where there are some; ``allow_pickle`` allows ``.bin`` files,
        of which tensors are read and nothing else. Raises :class:`ModelError` where weights and configuration do not
        fit.
        """
        folder = Path(folder)
        source = folder / "config.json"
        config = config_from_json(cls.config_class, read_json(source), source)
        weights = cls._weights(folder, variant, allow_pickle)
        module = cls.planned(config, weights).to(dtype or weights.precision())
        load_into(module, cls.rename(weights.read(dtype=dtype)), weights.path)
        return module.eval()

    @classmethod
    def planned(cls, config: Config, weights: TensorFile) -> Self:
        """The network on the meta device, as a file's weights are to fill it.

        Raises :class:`ModelError` for a configuration of more layers than the file has tensors, before it is built.
        """
        layers = getattr(config, "layers_per_block", 0) * len(getattr(config, "block_out_channels", ()))
        layers = max(layers, getattr(config, "num_hidden_layers", 0))
        if layers > len(weights.shapes):
            raise ModelError(
                f"{weights.path} holds {len(weights.shapes)} tensors, too few for the {layers} layers that its "
                "configuration says"
            )
        try:
            with torch.device("meta"):
                return cls(config)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise ModelError(f"{weights.path}: a network cannot have the shape that its configuration says") from error

    @classmethod
    def _weights(cls, folder: Path, variant: str | None, allow_pickle: bool) -> TensorFile:
        """The files of the variant, or the plain ones; safetensors before pickles, and one file before shards."""
        stem, _, kind = cls.weights_name.rpartition(".")
        names = ((stem, kind), ("pytorch_model" if stem == "model" else stem, "bin"))
        for middle in dict.fromkeys([f".{variant}" if variant else "", ""]):
            for name, suffix in names:
                whole = folder / f"{name}{middle}.{suffix}"
                index = folder / f"{name}.{suffix}.index{middle}.json"
                if whole.is_file():
                    return open_tensors(whole, allow_pickle)
                if index.is_file():
                    return Shards(index, allow_pickle)
        if others := sorted({file.name.split(".")[-2] for file in folder.glob(f"{stem}.*.{kind}")}):
            raise ModelError(f"{folder} has its weights as variant {' and '.join(others)} only: say which, as variant")
        raise ModelError(f"no weight file at {folder / cls.weights_name}: expected a .safetensors file there")

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and the weights, in ``dtype`` or in their own precision."""
        folder = Path(folder)
        tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}
        write_tensors(folder / self.weights_name, tensors)
        write_json(folder / "config.json", self.config_json())

    def config_json(self) -> dict[str, Any]:
        """The fields of ``config.json``."""
        return {
            "_class_name": self.class_name,
            "_diffusers_version": DIFFUSERS_VERSION,
            **dataclasses.asdict(self.config),  # type: ignore[call-overload]
        }

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bring the names that other writers use to this network's own; here, nothing to do."""
        return tensors

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.parameters()).dtype
