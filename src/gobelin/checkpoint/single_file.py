"""The original code's single files in and out: U-Net, VAE and text encoder in one ``.safetensors`` or ``.ckpt``."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gobelin.checkpoint.detect import ONLY, refuse_other_files
from gobelin.checkpoint.model import Model, Recommended
from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.errors import ModelError, UsageError
from gobelin.formats import ldm
from gobelin.formats.component import Component, config_from_json
from gobelin.formats.files import parse_json
from gobelin.formats.weights import TensorFile, and_more, load_into, open_tensors, write_tensors
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet, UNetConfig
from gobelin.vae import VAE, VAEConfig

Config = TypeVar("Config")
Network = TypeVar("Network", bound=Component)

OURS = "gobelin"
"""The key of a safetensors file's metadata that holds what its tensors do not tell: the configurations."""


def open_single_file(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    tokenizer: Callable[[], Tokenizer],
    vae: VAE | None = None,
    allow_pickle: bool = False,
    ema: bool = False,
) -> Model:
    """Read a single file. A ``vae`` that is given takes the place of the file's; ``ema`` takes the U-Net's average.

    Raises :class:`ModelError` that names what the file is, or the first tensor that does not fit.
    """
    original = _Original(open_tensors(path, allow_pickle), _plain_name)
    vae_is_given = vae is not None
    refuse_other_files(path, original.shapes)
    if not any(name.startswith(ldm.UNET) for name in original.shapes):
        is_vae = any(".mid.block_1." in name for name in original.shapes)
        raise ModelError(
            f"{path} is no model: it is {'a VAE: give it as vae' if is_vae else 'of no kind that is known'}"
        )
    unet_config = original.config(UNetConfig, "unet", ldm.unet_shape)
    if unet_config.cross_attention_dim == 1024 and "unet" not in original.said:
        raise ModelError(f"{path} is of Stable Diffusion 2.x; {ONLY}")
    if vae is None:
        vae = original.vae(dtype)
    said = original.said
    model = Model(
        unet=original.fill(
            UNet, unet_config, lambda keys: ldm.unet_names(keys, unet_config.layers_per_block), dtype, ema
        ).to(device),
        vae=vae.to(device),
        text_encoder=original.fill(
            TextEncoder, original.config(TextEncoderConfig, "text_encoder", _text_shape), ldm.text_names, dtype
        ).to(device),
        tokenizer=tokenizer(),
        schedule=NoiseSchedule(config_from_json(ScheduleConfig, said.get("schedule", {}), path)),
        recommended=config_from_json(Recommended, said.get("recommended", {}), path),
        world=said.get("world"),
        name=path.stem,
    )
    replaced = tuple(prefix for prefix, is_so in ((ldm.UNET, ema), (ldm.VAE, vae_is_given)) if is_so)
    if left := original.left(replaced):
        warnings.warn(f"{path} holds {left[0]!r}{and_more(left)}, which this model has no place for", stacklevel=2)
    return model


def save_single_file(model: Model, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a ``.safetensors`` file as the original code lays it out, in ``dtype`` or in the weights' own precision.

    The tokenizer has no place in such a file. What its tensors do not tell, the configurations, is in its metadata.
    """
    unet, vae, text = model.unet, model.vae, model.text_encoder
    tensors: dict[str, Tensor] = {}
    for component, names in (
        (unet, ldm.unet_names(unet.state_dict().keys(), unet.config.layers_per_block)),
        (vae, ldm.vae_names(vae.state_dict().keys(), len(vae.config.block_out_channels))),
        (text, ldm.text_names(text.state_dict().keys())),
    ):
        for key, tensor in component.state_dict().items():
            tensors[names[key]] = _with_kernel(names[key], tensor.to("cpu", dtype or tensor.dtype))
    parts = {"unet": unet.config, "vae": vae.config, "text_encoder": text.config, "schedule": model.schedule.config}
    said: dict[str, Any] = {name: dataclasses.asdict(config) for name, config in parts.items()}
    said["recommended"] = dataclasses.asdict(model.recommended)
    if model.world is not None:
        said["world"] = model.world
    write_tensors(path, tensors, {OURS: json.dumps(said)})


def open_vae_file(path: Path, dtype: torch.dtype | None, allow_pickle: bool = False) -> VAE:
    """Read a VAE that is a single file of its own, with or without the prefix that it has in a model's file."""
    original = _Original(open_tensors(path, allow_pickle), lambda name: f"{ldm.VAE}{name.removeprefix(ldm.VAE)}")
    vae = original.vae(dtype)
    if left := original.left():
        raise ModelError(f"{path} holds {left[0]!r}{and_more(left)}, which a VAE of Stable Diffusion 1.x has not")
    return vae


class _Original:
    """A file in the original code's layout, and which of its tensors were taken.

    ``shapes`` are by the names that this module's tables have, which ``plain`` makes of the file's; ``said`` is what
    Gobelin wrote beside the tensors, where it wrote the file.
    """

    def __init__(self, file: TensorFile, plain: Callable[[str], str]):
        self._file = file
        self._stored = {plain(name): name for name in file.shapes}
        self._taken: set[str] = set()
        self.shapes = {name: file.shapes[stored] for name, stored in self._stored.items()}
        self.said = parse_json(file.metadata.get(OURS, "{}"), f"{file.path}: what its metadata says under {OURS!r}")
        for name in ("unet", "vae", "text_encoder", "schedule", "recommended"):
            if not isinstance(self.said.get(name, {}), dict):
                raise ModelError(f"{file.path}: what its metadata says of the {name} is no object")
        if not isinstance(world := self.said.get("world"), str | None):
            raise ModelError(f"{file.path}: its metadata's world is {world!r}, expected the name of a world of scenes")

    def config(
        self, config_class: type[Config], part: str, shape: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]
    ) -> Config:
        """A network's configuration: what the tensors' shapes tell, and what is said besides."""
        try:
            told = shape(self.shapes)
        except (KeyError, IndexError, StopIteration, ValueError, UsageError) as error:
            raise ModelError(f"{self._file.path} is not laid out as a Stable Diffusion 1.x file: {error!r}") from error
        return config_from_json(config_class, {**told, **self.said.get(part, {})}, self._file.path)

    def vae(self, dtype: torch.dtype | None) -> VAE:
        """The file's VAE."""
        config = self.config(VAEConfig, "vae", ldm.vae_shape)
        return self.fill(VAE, config, lambda keys: ldm.vae_names(keys, len(config.block_out_channels)), dtype)

    def fill(
        self,
        component: type[Network],
        config: Any,
        names: Callable[[Collection[str]], dict[str, str]],
        dtype: torch.dtype | None,
        ema: bool = False,
    ) -> Network:
        """A network with its weights, or with their average; ``names`` are the originals of its own."""
        path = self._file.path
        module = component.planned(config, self._file)
        originals = names(module.state_dict().keys())
        if ema:
            originals = {key: ldm.ema_name(original) for key, original in originals.items()}
            if missing := [one for one in originals.values() if one not in self._stored]:
                raise ModelError(f"{path} has no average (EMA) of its U-Net's weights: it lacks {missing[0]!r}")
        wanted = {key: self._stored[original] for key, original in originals.items() if original in self._stored}
        module = module.to(dtype or self._file.precision(wanted.values()))
        tensors = self._file.read(wanted.values(), dtype)
        load_into(module, {key: _without_kernel(originals[key], tensors[one]) for key, one in wanted.items()}, path)
        self._taken.update(originals.values())
        return module.eval()

    def left(self, replaced: tuple[str, ...] = ()) -> list[str]:
        """The names that were not taken, but for those that are no cause for a word, and those with these prefixes."""
        names = sorted(self._stored.keys() - self._taken)
        return [name for name in names if not ldm.PASSED_OVER.match(name) and not name.startswith(replaced)]


def _plain_name(name: str) -> str:
    """A tensor's name with the text encoder's prefix, which some files leave out."""
    short = name.removeprefix(ldm.TEXT)
    bare = name.startswith(ldm.TEXT) and not short.startswith("text_model.")
    return f"{ldm.TEXT}text_model.{short}" if bare else name


def _text_shape(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    shape = ldm.text_shape(shapes)
    derived = TextEncoderConfig.of(
        shape["hidden_size"],
        layers=shape["num_hidden_layers"],
        heads=max(1, shape["hidden_size"] // 64),  # as all of CLIP's have them
        vocab_size=shape["vocab_size"],
        max_position_embeddings=shape["max_position_embeddings"],
    )
    return {**dataclasses.asdict(derived), **shape}


def _without_kernel(original: str, tensor: Tensor) -> Tensor:
    """A 1×1 convolution's weight as a linear layer's, where it stands for one."""
    return tensor.flatten(1) if ldm.is_vae_attention(original) and tensor.ndim == 4 else tensor


def _with_kernel(original: str, tensor: Tensor) -> Tensor:
    return tensor[:, :, None, None] if ldm.is_vae_attention(original) else tensor
