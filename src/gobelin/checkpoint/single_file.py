"""Single files of the original (LDM) code, read and written: U-Net, VAE and text encoder together.

Gobelin writes ``.safetensors`` with the configurations in the metadata, and reads ``.ckpt`` too; without such metadata,
configurations are inferred from the tensors' shapes.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gobelin.checkpoint.detect import SUPPORTED, describe_network_file, refuse_unsupported_file
from gobelin.checkpoint.float8_scales import read_float8_scales
from gobelin.checkpoint.model import Model, recommended_from_json
from gobelin.checkpoint.schedule_hints import MARKER_KEYS, read_schedule_hints
from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.errors import ModelError, UsageError
from gobelin.formats import ldm
from gobelin.formats.component import Component, ConfigT, config_from_json
from gobelin.formats.files import parse_json
from gobelin.formats.weights import TensorFile, and_more, load_into, open_tensors, write_tensors
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
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
    schedule: Mapping[str, Any] | None = None,
) -> Model:
    """Read a single file onto ``device``, in ``dtype`` or each tensor's own precision (None).

    A ``vae`` that is given takes the place of the file's; ``ema`` takes the moving average of the U-Net's weights. The
    fields of ``schedule`` (:class:`~gobelin.schedule.ScheduleConfig`) take the place of what the file says. Raises
    :class:`ModelError` that names what the file is, the part that is missing, or the first tensor that does not fit or
    is of no network; warns of tensors that cannot change an image.
    """
    tensors = open_tensors(path, allow_pickle)
    refuse_unsupported_file(path, tensors.shapes, tensors.metadata)
    file = _LDMFile(tensors, {name: ldm.normalize_key(name) for name in tensors.shapes})
    vae_is_given = vae is not None
    _refuse_missing_part(file, ema, vae_is_given)
    own = file.metadata.get("schedule", {})
    hints = read_schedule_hints(path, tensors.shapes, tensors.metadata, given=schedule or {}, own=own)
    for what, ours, said in (
        ("scaling_factor", file.metadata.get("vae", {}).get("scaling_factor"), hints.scaling_factor),
        ("attention_head_dim", file.metadata.get("unet", {}).get("attention_head_dim"), hints.heads),
        ("scaling_factor", vae.config.scaling_factor if vae is not None else None, hints.scaling_factor),
    ):
        if None not in (ours, said) and ours != said:
            where = "its metadata or the VAE given"
            raise ModelError(f"{path}: {what} is {ours} by {where} and {said} by the .yaml beside it: remove one")
    heads = {} if hints.heads is None else {"attention_head_dim": hints.heads}
    unet_config = file.config(UNetConfig, "unet", lambda shapes: ldm.infer_unet_config(shapes) | heads)
    if "unet" not in file.metadata:
        _refuse_other_unet(path, unet_config)
    if vae is None:
        vae = file.vae(dtype, hints.scaling_factor)
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
        schedule=NoiseSchedule(config_from_json(ScheduleConfig, {**own, **hints.fields, **(schedule or {})}, path)),
        recommended=recommended_from_json(file.metadata.get("recommended", {}), path),
        world=file.metadata.get("world"),
        name=path.stem,
    )
    if not schedule:
        file.refuse_other_tables(model.schedule)
    if unused := file.unused((ldm.VAE_PREFIX,) if vae_is_given else (), ema):
        warnings.warn(f"{path} holds {unused[0]!r}{and_more(unused)}, which this model has no place for", stacklevel=2)
    return model


def _refuse_missing_part(file: "_LDMFile", ema: bool, vae_is_given: bool) -> None:
    """Raise :class:`ModelError` that names what a file is, or the part of a model that it lacks."""
    if not file.has(ldm.UNET_PREFIX):
        if not file.has(f"{ldm.EMA_PREFIX}diffusion_model"):
            what = describe_network_file(file.shapes) or "of no known kind"
            raise ModelError(f"{file.path} is no model: it is {what}")
        if not ema:
            raise ModelError(
                f"{file.path} has only the average (EMA) of its U-Net's weights: take it, with ema (--ema)"
            )
        file.name_average()
    if not vae_is_given and not file.has(ldm.VAE_PREFIX):
        raise ModelError(f"{file.path} has no VAE: give one, as vae (--vae)")
    if not file.has(ldm.TEXT_PREFIX):
        raise ModelError(f"{file.path} has no text encoder (no {ldm.TEXT_PREFIX}…): give a file of a whole model")


def _refuse_other_unet(path: Path, config: UNetConfig) -> None:
    """Raise :class:`ModelError` that names the model of a U-Net whose shape is none of Stable Diffusion 1.x's."""
    if config.cross_attention_dim == 1024:
        raise ModelError(f"{path} is of Stable Diffusion 2.x; {SUPPORTED}")
    if config.out_channels == 4 and config.in_channels not in (4, 9):
        known = {8: ", as InstructPix2Pix's", 5: ", as depth2img's", 7: ", as an upscaler's"}
        raise ModelError(
            f"{path}: its U-Net takes {config.in_channels} channels{known.get(config.in_channels, '')}, and only 4 "
            "and, for inpainting, 9 are supported"
        )


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
    schedule = model.schedule.config
    tensors |= {
        key: torch.zeros(0)
        for key, is_so in zip(
            MARKER_KEYS, (schedule.prediction_type == "v_prediction", schedule.rescale_betas_zero_snr), strict=True
        )
        if is_so
    }
    configs = {"unet": unet.config, "vae": vae.config, "text_encoder": text.config, "schedule": schedule}
    metadata: dict[str, Any] = {name: dataclasses.asdict(config) for name, config in configs.items()}
    metadata["recommended"] = dict(model.recommended)
    if model.world is not None:
        metadata["world"] = model.world
    prediction = "v" if schedule.prediction_type == "v_prediction" else "epsilon"
    write_tensors(path, tensors, {_METADATA_KEY: json.dumps(metadata), "modelspec.prediction_type": prediction})


def open_vae_file(path: Path, dtype: torch.dtype | None, allow_pickle: bool = False) -> VAE:
    """Read the VAE of a single file: a VAE's own, in the original layout or diffusers', or a whole model's.

    A VAE's own file has its keys with or without the prefix that they have in a model's. Raises :class:`ModelError`
    that names what the file is, or the first tensor that does not fit or is left over.
    """
    tensors = open_tensors(path, allow_pickle)
    is_model = any(name.startswith(ldm.UNET_PREFIX) for name in tensors.shapes)
    if any(name.startswith("encoder.down_blocks.") for name in tensors.shapes):
        try:
            keys = ldm.diffusers_vae_keys(VAE.map_names(tensors.shapes))
        except KeyError as error:
            raise ModelError(
                f"{path} is no VAE of Stable Diffusion 1.x: its attention has {error.args[0]!r}"
            ) from error
    else:
        start = "" if is_model else ldm.VAE_PREFIX
        keys = {name: ldm.normalize_key(f"{start}{name.removeprefix(start)}") for name in tensors.shapes}
    file = _LDMFile(tensors, keys)
    refuse_unsupported_file(path, tensors.shapes, tensors.metadata)
    if not is_model:
        if not file.has(f"{ldm.VAE_PREFIX}decoder.") or not file.has(f"{ldm.VAE_PREFIX}encoder."):
            what = describe_network_file(tensors.shapes)
            raise ModelError(f"{path} is no VAE{f': it is {what}' if what else ' of Stable Diffusion 1.x'}")
    elif not file.has(ldm.VAE_PREFIX):
        raise ModelError(f"{path} is a model without a VAE: give the file of a VAE")
    vae = file.vae(dtype)
    if vae.config.latent_channels != 4 and "vae" not in file.metadata:
        raise ModelError(
            f"{path} is a VAE of {vae.config.latent_channels} latent channels, as later models have; {SUPPORTED}, "
            "with 4"
        )
    others = (ldm.UNET_PREFIX, ldm.TEXT_PREFIX) if is_model else ()
    if (unused := file.unused(others)) and not is_model:
        raise ModelError(f"{path} holds {unused[0]!r}{and_more(unused)}, which no VAE of Stable Diffusion 1.x has")
    return vae


class _LDMFile:
    """A file in the original code's layout, which remembers the tensors that were loaded from it.

    ``shapes`` are by the keys of :mod:`gobelin.formats.ldm`, to which ``keys`` maps the file's; ``metadata`` is
    Gobelin's own, empty in other tools' files.
    """

    def __init__(self, file: TensorFile, keys: Mapping[str, str]):
        self._file, self.path = file, file.path
        self._stored = {key: name for name, key in keys.items()}
        if len(self._stored) < len(keys):
            twice = next(name for name, key in keys.items() if self._stored[key] != name)
            raise ModelError(
                f"{self.path} holds {twice!r} and {self._stored[keys[twice]]!r}, which are the same tensor"
            )
        self._loaded: set[str] = set()
        self.shapes = {key: file.shapes[stored] for key, stored in self._stored.items()}
        source = f"{file.path}: its metadata under {_METADATA_KEY!r}"
        self.metadata = parse_json(file.metadata.get(_METADATA_KEY, "{}"), source)
        for name in ("unet", "vae", "text_encoder", "schedule", "recommended"):
            if not isinstance(self.metadata.get(name, {}), dict):
                raise ModelError(f"{source}: {name} is no object")
        if not isinstance(world := self.metadata.get("world"), str | None):
            raise ModelError(f"{source}: world is {world!r}, expected the name of a world of scenes")

    def has(self, start: str) -> bool:
        """Tell whether some key begins so."""
        return any(key.startswith(start) for key in self.shapes)

    def name_average(self) -> None:
        """Give the average (EMA) of the U-Net's weights the shapes of the weights, which the file does not have.

        Without dots, names cannot be taken apart: they are those of Stable Diffusion 1.5's blocks, at any width.
        """
        with torch.device("meta"):
            names = ldm.map_unet_keys(UNet(UNetConfig.sd15()).state_dict().keys(), UNetConfig.sd15().layers_per_block)
        averages = {original: ldm.map_ema_key(original) for original in names.values()}
        self.shapes |= {original: self.shapes[key] for original, key in averages.items() if key in self.shapes}

    def config(
        self,
        config_class: type[ConfigT],
        component: str,
        infer: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]],
    ) -> ConfigT:
        """Build a network's configuration: inferred from the tensors' shapes, overridden by the metadata."""
        try:
            inferred = infer(self.shapes)
        except KeyError as error:
            raise ModelError(
                f"{self.path} is not laid out as a Stable Diffusion 1.x file: it lacks {error.args[0]!r}"
            ) from error
        except (IndexError, StopIteration, ValueError, UsageError) as error:
            raise ModelError(f"{self.path} is not laid out as a Stable Diffusion 1.x file: {error!r}") from error
        return config_from_json(config_class, {**inferred, **self.metadata.get(component, {})}, self._file.path)

    def vae(self, dtype: torch.dtype | None, scaling_factor: float | None = None) -> VAE:
        """Load the VAE; ``scaling_factor`` None is Stable Diffusion 1.x's, where the metadata has none."""
        scaling = {} if scaling_factor is None else {"scaling_factor": scaling_factor}
        config = self.config(VAEConfig, "vae", lambda shapes: ldm.infer_vae_config(shapes) | scaling)
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
        path = self.path
        module = component.build_on_meta(config, self._file)
        originals = map_keys(module.state_dict().keys())
        if ema:
            originals = {key: ldm.map_ema_key(original) for key, original in originals.items()}
            if missing := [original for original in originals.values() if original not in self._stored]:
                raise ModelError(f"{path} has no average (EMA) of its U-Net's weights: it lacks {missing[0]!r}")
        stored = {key: self._stored[original] for key, original in originals.items() if original in self._stored}
        tensors = self._file.read(stored.values(), dtype)
        scales, read = read_float8_scales(self._file, self._stored, [originals[key] for key in stored])
        for key, scale in scales.items():
            weight = self._stored[key]
            tensors[weight] = (self._file.read([weight])[weight].float() * scale).to(dtype or torch.float32)
        load_into(module, {key: _to_linear(originals[key], tensors[name]) for key, name in stored.items()}, path, dtype)
        self._loaded.update(originals.values(), read)
        return module.eval()

    def dtype(self, key: str) -> torch.dtype:
        """Return the precision in which a tensor is stored."""
        return self._file.dtypes[self._stored[key]]

    def refuse_other_tables(self, schedule: NoiseSchedule) -> None:
        """Raise :class:`ModelError` for a table of a noise schedule other than ``schedule``, which CompVis' code obeys.

        The tables are the buffers of ``DDPM.register_schedule`` (``ldm/models/diffusion/ddpm.py``).
        """
        products = schedule.alphas_cumprod
        betas = 1 - products / torch.cat([torch.ones(1), products[:-1]])
        for name, expected, off in (("alphas_cumprod", products, 2e-3), ("betas", betas, 2e-4)):
            if name not in self._stored or self.dtype(name).itemsize == 1:  # eight bits cannot tell schedules apart
                continue
            found = self._file.read([self._stored[name]])[self._stored[name]].float()
            if found.shape != expected.shape or not torch.allclose(found, expected.float(), rtol=2e-3, atol=off):
                raise ModelError(
                    f"{self.path}: its table {name} is of another noise schedule than the rest of the file says: say "
                    "which, with prediction_type (--prediction-type) and zero_terminal_snr (--zero-terminal-snr)"
                )

    def unused(self, replaced: tuple[str, ...] = (), ema: bool = False) -> list[str]:
        """List the tensors that no network loaded and no image depends on, but those with ``replaced`` prefixes.

        Known leftovers of training are not among them; with ``ema`` the weights whose average was loaded are leftovers,
        and other averages are not. Raises :class:`ModelError` for what an image might depend on: a tensor with the
        prefix of a network, and a marker, which is one number or none, of unknown meaning.
        """
        left = [
            key
            for key in sorted(self._stored.keys() - self._loaded - set(MARKER_KEYS))
            if not ldm.IGNORED_KEYS.match(key)
            and not key.startswith(replaced)
            and not (ema and key.startswith(ldm.UNET_PREFIX) and ldm.map_ema_key(key) in self._loaded)
        ]
        if ema:
            start = f"{ldm.EMA_PREFIX}diffusion_model"
            averages = sorted(key for key in self._stored.keys() - self._loaded if key.startswith(start))
            if averages:
                raise ModelError(
                    f"{self.path} holds {averages[0]!r}{and_more(averages)}, the average of no layer of its U-Net"
                )
        networks = (ldm.UNET_PREFIX, ldm.VAE_PREFIX, ldm.TEXT_PREFIX)
        if lost := [self._stored[key] for key in left if key.startswith(networks)]:
            raise ModelError(
                f"{self.path} holds {lost[0]!r}{and_more(lost)}, which no part of Stable Diffusion 1.x has"
            )
        if markers := [self._stored[key] for key in left if prod(self.shapes[key]) <= 1]:
            raise ModelError(
                f"{self.path} holds the marker {markers[0]!r}, whose meaning is unknown here and might change images"
            )
        return [self._stored[key] for key in left]


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
