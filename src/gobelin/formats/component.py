"""Components of a diffusers folder: one network each, with its ``config.json`` and its weights."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gobelin.errors import ModelError, UsageError
from gobelin.formats.files import read_json, refuse_broken_link, write_json
from gobelin.formats.weights import ShardedFile, TensorFile, load_into, open_tensors, write_tensors

DIFFUSERS_VERSION = "0.35.0"  # the version whose folder layout is written

ConfigT = TypeVar("ConfigT")


def config_from_json(config_class: type[ConfigT], content: dict[str, Any], source: Path) -> ConfigT:
    """Build a frozen dataclass from the ``content`` of a config file; lists become tuples.

    Fields that the dataclass lacks are ignored, except those in its ``fixed`` table, which must have the one value that
    the table allows. Raises :class:`ModelError` that names ``source`` and the first field that is missing, of another
    type, or asks for what the architecture does not compute.
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


class _WithoutInitialValues(TorchFunctionMode):
    """Leave tensors as they are where :mod:`torch.nn.init` would draw their initial values.

    On the meta device there are none, and what draws them there imports PyTorch's compiler ("What a start waits for").
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


class Component(nn.Module, Generic[ConfigT]):
    """A network with a frozen ``config`` that reads and writes itself as one folder of a diffusers model."""

    config_class: ClassVar[type]
    class_name: ClassVar[str]  # in diffusers or transformers
    weights_name: ClassVar[str]

    def __init__(self, config: ConfigT):
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
        """Read ``config.json`` and the weights beside it, whole or in shards; ``dtype`` None keeps each tensor's own.

        ``variant`` ("fp16") picks the files of that name where the folder has some; ``allow_pickle`` allows ``.bin``
        files, from which only tensors are read. Raises :class:`ModelError` where weights and configuration do not fit.
        """
        folder = Path(folder)
        source = folder / "config.json"
        config = config_from_json(cls.config_class, read_json(source), source)
        weights = cls._open_weights(folder, variant, allow_pickle)
        module = cls.build_on_meta(config, weights)
        keys = cls.map_names(weights.shapes)
        named: dict[str, str] = {}
        for name, key in keys.items():
            if (other := named.setdefault(key, name)) != name:
                raise ModelError(f"{weights.path} holds {other!r} and {name!r}, which are the same tensor")
        tensors = weights.read(keys, dtype)
        load_into(module, {key: tensors[name] for name, key in keys.items()}, weights.path, dtype)
        return module.eval()

    @classmethod
    def build_on_meta(cls, config: ConfigT, weights: TensorFile) -> Self:
        """Build the network on the meta device, where it takes no memory, for ``weights`` to be loaded into it.

        Raises :class:`ModelError` for a configuration that no network can have.
        """
        # Even on the meta device a billion layers would fill the memory with modules; every layer has a tensor.
        layers = getattr(config, "layers_per_block", 0) * len(getattr(config, "block_out_channels", ()))
        layers = max(layers, getattr(config, "num_hidden_layers", 0))
        if layers > len(weights.shapes):
            raise ModelError(
                f"{weights.path} holds {len(weights.shapes)} tensors, too few for the {layers} layers that its "
                "configuration asks for"
            )
        try:
            with torch.device("meta"), _WithoutInitialValues():
                return cls(config)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise ModelError(
                f"{weights.path}: no network can have the shape that its configuration asks for"
            ) from error

    @classmethod
    def _open_weights(cls, folder: Path, variant: str | None, allow_pickle: bool) -> TensorFile:
        """Open the variant's files, or the plain ones: safetensors before pickles, one file before shards."""
        stem, _, kind = cls.weights_name.rpartition(".")
        names = ((stem, kind), ("pytorch_model" if stem == "model" else stem, "bin"))
        for middle in dict.fromkeys([f".{variant}" if variant else "", ""]):
            for name, suffix in names:
                whole = folder / f"{name}{middle}.{suffix}"
                index = folder / f"{name}.{suffix}.index{middle}.json"
                for file in (whole, index):
                    refuse_broken_link(file)
                if whole.is_file():
                    return open_tensors(whole, allow_pickle)
                if index.is_file():
                    return ShardedFile(index, allow_pickle)
        if others := sorted({file.name.split(".")[-2] for file in folder.glob(f"{stem}.*.{kind}")}):
            raise ModelError(f"{folder} has its weights as variant {' and '.join(others)} only: name it, as variant")
        raise ModelError(f"no weight file at {folder / cls.weights_name}: expected a .safetensors file there")

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and the weights, in ``dtype`` or in their own precision (None)."""
        folder = Path(folder)
        tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}
        write_tensors(folder / self.weights_name, tensors)
        write_json(folder / "config.json", self.config_json())

    def config_json(self) -> dict[str, Any]:
        """Return the fields of ``config.json`` as diffusers reads them."""
        return {
            "_class_name": self.class_name,
            "_diffusers_version": DIFFUSERS_VERSION,
            **dataclasses.asdict(self.config),  # type: ignore[call-overload]
        }

    @classmethod
    def map_names(cls, names: Iterable[str]) -> dict[str, str]:
        """Map the names of a file's tensors to this network's state-dict keys; subclasses know other writers' names.

        Names that are left out are of tensors that no image depends on.
        """
        return {name: name for name in names}

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.parameters()).dtype
