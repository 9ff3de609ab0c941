"""A component of a diffusers folder: one network, its ``config.json`` and its weights."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from gobelin.errors import ModelError, UsageError
from gobelin.formats.files import read_json, write_json
from gobelin.formats.weights import load_into, read_tensors, write_tensors

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
    try:
        return config_class(**values)
    except (UsageError, TypeError) as error:
        raise ModelError(f"{source}: {error}") from error


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
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """Read ``config.json`` and the weights beside it; raises :class:`ModelError` where they do not fit."""
        folder = Path(folder)
        source = folder / "config.json"
        config = config_from_json(cls.config_class, read_json(source), source)
        with torch.device("meta"):
            module = cls(config).to(dtype)
        weights = folder / cls.weights_name
        load_into(module, cls.rename(read_tensors(weights)), weights)
        return module.eval()

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
