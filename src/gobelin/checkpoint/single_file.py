"""Single files of the original (LDM) code, read and written: U-Net, VAE and text encoder together.

Gobelin writes ``.safetensors`` with the configurations in the metadata, and reads ``.ckpt`` too; without such metadata,
configurations are inferred from the tensors' shapes.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gobelin.checkpoint.detect import SUPPORTED, refuse_unsupported_file
from gobelin.checkpoint.model import Model, recommended_from_json
from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.errors import ModelError, UsageError
from gobelin.formats import ldm
from gobelin.formats.component import Component, ConfigT, config_from_json
from gobelin.formats.files import parse_json
from gobelin.formats.weights import TensorFile, and_more, load_into, open_tensors, write_tensors
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet, UNetConfig
from gobelin.vae import VAE, VAEConfig

_ComponentT = TypeVar("_ComponentT", bound=Component)

_METADATA_KEY = "gobelin"  # of the safetensors metadata: what tensors do not tell, the configurations


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
    """Read a single file onto ``device``, in ``dtype`` or each network's own precision (None).

    A ``vae`` that is given takes the place of the file's; ``ema`` takes the moving average of the U-Net's weights.
    Raises :class:`ModelError` that names what the file is, or the first tensor that does not fit; warns of tensors that
    no network has.
    """
    file = _LDMFile(open_tensors(path, allow_pickle), _with_text_model)
    vae_is_given = vae is not None
    refuse_unsupported_file(path, file.shapes)
    if not any(key.startswith(ldm.UNET_PREFIX) for key in file.shapes):
        is_vae = any(".mid.block_1." in key for key in file.shapes)
        raise ModelError(f"{path} is no model: it is {'a VAE: give it as vae' if is_vae else 'of no known kind'}")
    unet_config = file.config(UNetConfig, "unet", ldm.infer_unet_config)
    # 1024 is the width of 2.x's text encoder, unless Gobelin's own metadata says otherwise.
    if unet_config.cross_attention_dim == 1024 and "unet" not in file.metadata:
        raise ModelError(f"{path} is of Stable Diffusion 2.x; {SUPPORTED}")
    if vae is None:
        vae = file.vae(dtype)
    model = Model(
        unet=file.load(
            UNet, unet_config, lambda keys: ldm.map_unet_keys(keys, unet_config.layers_per_block), dtype, ema
        ).to(device),
        vae=vae.to(device),
        text_encoder=file.load(
            TextEncoder,
            file.config(TextEncoderConfig, "text_encoder", _infer_text_config),
            ldm.map_text_keys,
            dtype,
        ).to(device),
        tokenizer=tokenizer(),
        schedule=NoiseSchedule(config_from_json(ScheduleConfig, file.metadata.get("schedule", {}), path)),
        recommended=recommended_from_json(file.metadata.get("recommended", {}), path),
        world=file.metadata.get("world"),
        name=path.stem,
    )
    replaced = tuple(prefix for prefix, is_so in ((ldm.UNET_PREFIX, ema), (ldm.VAE_PREFIX, vae_is_given)) if is_so)
    if unused := file.unused(replaced):
        warnings.warn(f"{path} holds {unused[0]!r}{and_more(unused)}, which this model has no place for", stacklevel=2)
    return model


def save_single_file(model: Model, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a ``.safetensors`` file in the original code's layout, in ``dtype`` or the weights' own precision (None).

    The tokenizer has no place in such a file. The configurations, which its tensors do not tell, go into its metadata.
    """
    unet, vae, text = model.unet, model.vae, model.text_encoder
    tensors: dict[str, Tensor] = {}
    for component, originals in (
        (unet, ldm.map_unet_keys(unet.state_dict().keys(), unet.config.layers_per_block)),
        (vae, ldm.map_vae_keys(vae.state_dict().keys(), len(vae.config.block_out_channels))),
        (text, ldm.map_text_keys(text.state_dict().keys())),
    ):
        for key, tensor in component.state_dict().items():
            tensors[originals[key]] = _to_conv(originals[key], tensor.to("cpu", dtype or tensor.dtype))
    configs = {"unet": unet.config, "vae": vae.config, "text_encoder": text.config, "schedule": model.schedule.config}
    metadata: dict[str, Any] = {name: dataclasses.asdict(config) for name, config in configs.items()}
    metadata["recommended"] = dict(model.recommended)
    if model.world is not None:
        metadata["world"] = model.world
    write_tensors(path, tensors, {_METADATA_KEY: json.dumps(metadata)})


def open_vae_file(path: Path, dtype: torch.dtype | None, allow_pickle: bool = False) -> VAE:
    """Read a VAE that is a single file of its own, with or without the prefix that its keys have in a model's file."""
    file = _LDMFile(open_tensors(path, allow_pickle), lambda key: f"{ldm.VAE_PREFIX}{key.removeprefix(ldm.VAE_PREFIX)}")
    vae = file.vae(dtype)
    if unused := file.unused():
        raise ModelError(f"{path} holds {unused[0]!r}{and_more(unused)}, which no VAE of Stable Diffusion 1.x has")
    return vae


class _LDMFile:
    """A file in the original code's layout, which remembers the tensors that were loaded from it.

    ``shapes`` are by the keys of :mod:`gobelin.formats.ldm`, which ``normalize`` makes of the file's; ``metadata`` is
    Gobelin's own, empty in other tools' files.
    """

    def __init__(self, file: TensorFile, normalize: Callable[[str], str]):
        self._file = file
        self._stored = {normalize(name): name for name in file.shapes}
        self._loaded: set[str] = set()
        self.shapes = {key: file.shapes[stored] for key, stored in self._stored.items()}
        source = f"{file.path}: its metadata under {_METADATA_KEY!r}"
        self.metadata = parse_json(file.metadata.get(_METADATA_KEY, "{}"), source)
        for name in ("unet", "vae", "text_encoder", "schedule", "recommended"):
            if not isinstance(self.metadata.get(name, {}), dict):
                raise ModelError(f"{source}: {name} is no object")
        if not isinstance(world := self.metadata.get("world"), str | None):
            raise ModelError(f"{source}: world is {world!r}, expected the name of a world of scenes")

    def config(
        self,
        config_class: type[ConfigT],
        component: str,
        infer: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]],
    ) -> ConfigT:
        """Build a network's configuration: inferred from the tensors' shapes, overridden by the metadata."""
        try:
            inferred = infer(self.shapes)
        except (KeyError, IndexError, StopIteration, ValueError, UsageError) as error:
            raise ModelError(f"{self._file.path} is not laid out as a Stable Diffusion 1.x file: {error!r}") from error
        return config_from_json(config_class, {**inferred, **self.metadata.get(component, {})}, self._file.path)

    def vae(self, dtype: torch.dtype | None) -> VAE:
        """Load the VAE."""
        config = self.config(VAEConfig, "vae", ldm.infer_vae_config)
        return self.load(VAE, config, lambda keys: ldm.map_vae_keys(keys, len(config.block_out_channels)), dtype)

    def load(
        self,
        component: type[_ComponentT],
        config: Any,
        map_keys: Callable[[Collection[str]], dict[str, str]],
        dtype: torch.dtype | None,
        ema: bool = False,
    ) -> _ComponentT:
        """Build a network and load its weights, or their moving average; ``map_keys`` maps its keys to the file's."""
        path = self._file.path
        module = component.build_on_meta(config, self._file)
        originals = map_keys(module.state_dict().keys())
        if ema:
            originals = {key: ldm.map_ema_key(original) for key, original in originals.items()}
            if missing := [original for original in originals.values() if original not in self._stored]:
                raise ModelError(f"{path} has no average (EMA) of its U-Net's weights: it lacks {missing[0]!r}")
        stored = {key: self._stored[original] for key, original in originals.items() if original in self._stored}
        module = module.to(dtype or self._file.float_dtype(stored.values()))
        tensors = self._file.read(stored.values(), dtype)
        load_into(module, {key: _to_linear(originals[key], tensors[name]) for key, name in stored.items()}, path)
        self._loaded.update(originals.values())
        return module.eval()

    def unused(self, replaced: tuple[str, ...] = ()) -> list[str]:
        """List the keys that no network loaded, except training's leftovers and keys with ``replaced`` prefixes."""
        keys = sorted(self._stored.keys() - self._loaded)
        return [key for key in keys if not ldm.IGNORED_KEYS.match(key) and not key.startswith(replaced)]


def _with_text_model(name: str) -> str:
    """Insert ``text_model.`` into a key of the text encoder where a file leaves it out."""
    short = name.removeprefix(ldm.TEXT_PREFIX)
    bare = name.startswith(ldm.TEXT_PREFIX) and not short.startswith("text_model.")
    return f"{ldm.TEXT_PREFIX}text_model.{short}" if bare else name


def _infer_text_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer a text encoder's whole configuration: all of CLIP's have heads of 64 channels."""
    inferred = ldm.infer_text_config(shapes)
    derived = TextEncoderConfig.of(
        inferred["hidden_size"],
        layers=inferred["num_hidden_layers"],
        heads=max(1, inferred["hidden_size"] // 64),
        vocab_size=inferred["vocab_size"],
        max_position_embeddings=inferred["max_position_embeddings"],
    )
    return {**dataclasses.asdict(derived), **inferred}


def _to_linear(original: str, tensor: Tensor) -> Tensor:
    """Flatten the weight of a 1×1 convolution [out, in, 1, 1] that stands for a linear layer."""
    return tensor.flatten(1) if ldm.is_vae_attention_weight(original) and tensor.ndim == 4 else tensor


def _to_conv(original: str, tensor: Tensor) -> Tensor:
    """Undo :func:`_to_linear`."""
    return tensor[:, :, None, None] if ldm.is_vae_attention_weight(original) else tensor
