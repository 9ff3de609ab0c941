"""Open a model from a diffusers folder, a single file, or a repository of the Hub."""

import re
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from gobelin.checkpoint.clip_tokenizer import find_clip_tokenizer
from gobelin.checkpoint.diffusers_folder import HEAD_WEIGHTS, MODEL_INDEX, open_folder
from gobelin.checkpoint.model import NETWORKS, Model
from gobelin.checkpoint.shipped import SHIPPED_MODELS, find_model
from gobelin.checkpoint.single_file import open_single_file, open_vae_file
from gobelin.errors import ModelError, UsageError
from gobelin.formats.files import is_there, refuse_broken_link
from gobelin.kernels.hardware import has_fast_bfloat16
from gobelin.schedule import PredictionType
from gobelin.tokenizer import Tokenizer
from gobelin.vae import VAE
from gobelin.validation import shown

# The files of a repository that are needed; nothing else is downloaded.
_CONFIG_PATTERNS = (
    "model_index.json",
    "gobelin.json",
    HEAD_WEIGHTS,
    "scheduler/*.json",
    "tokenizer/*",
    *(f"{network}/*.json" for network in NETWORKS),
)
_SMALL_MODEL = 100_000_000  # bytes of its files
_WEIGHT_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "*-of-*")


def open_model(
    path: str | Path,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"] | None,
    *,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    ema: bool = False,
    prediction_type: PredictionType | None = None,
    zero_terminal_snr: bool = False,
) -> Model:
    """Open a diffusers folder, an original single file, a model that ships by its name, or a repository of the Hub by
    its name ``owner/name``.

    ``dtype`` None keeps each tensor's own precision, and "auto" is :func:`fastest_dtype`. ``tokenizer``, a folder,
    takes the place of the model's own or of CLIP's; so does ``vae``, a folder or a file. ``variant`` ("fp16") picks
    among a folder's files. ``allow_pickle`` allows ``.ckpt`` and ``.bin``, from which only tensors are read. ``ema``
    takes the moving average of a single file's U-Net. ``prediction_type`` and ``zero_terminal_snr`` say what the U-Net
    was trained with, where the model does not, or wrongly. Raises :class:`ModelError` that names the file and what is
    wrong with it, and :class:`UsageError` for options that do not apply to it.
    """
    source = find_model(_path(path, "model"))
    schedule: dict[str, Any] = {} if prediction_type is None else {"prediction_type": prediction_type}
    if zero_terminal_snr:
        schedule["rescale_betas_zero_snr"] = True
    if not source.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        source = _download(str(path), variant, allow_pickle)
    if dtype == "auto":
        dtype = fastest_dtype(device, source)
    given_tokenizer = None if tokenizer is None else Tokenizer.from_pretrained(_path(tokenizer, "tokenizer"))
    given_vae = None if vae is None else _open_vae(_path(vae, "VAE"), dtype, variant, allow_pickle)
    if source.is_file():
        if variant is not None:
            raise UsageError(f"variant is {variant!r}, but {source} is a single file: leave it out")
        return open_single_file(
            source,
            device,
            dtype,
            tokenizer=lambda: given_tokenizer or find_clip_tokenizer(source),
            vae=given_vae,
            allow_pickle=allow_pickle,
            ema=ema,
            schedule=schedule,
        )
    if not is_there(source / MODEL_INDEX):
        raise ModelError(
            f"no model at {source}: expected a folder with a {MODEL_INDEX}, a .safetensors or .ckpt file, a Hub name, "
            f"or a model that ships: {', '.join(SHIPPED_MODELS)}"
        )
    if ema:
        raise UsageError(f"ema is for single files, and {source} is a folder: leave it out")
    return open_folder(
        source,
        device,
        dtype,
        tokenizer=given_tokenizer,
        vae=given_vae,
        variant=variant,
        allow_pickle=allow_pickle,
        schedule=schedule,
    )


def fastest_dtype(device: torch.device, source: Path) -> torch.dtype:
    """Choose the precision in which a device paints fastest: bfloat16 where it multiplies that faster, if it pays.

    For Stable Diffusion it pays three times over. A model whose files take less than 100 MB is computed in float32:
    there it brings little, and images stay the same from machine to machine.
    """
    files = [source] if source.is_file() else [*source.glob("*/*.safetensors"), *source.glob("*/*.bin")]
    is_small = sum(file.stat().st_size for file in files if file.is_file()) < _SMALL_MODEL
    return torch.bfloat16 if not is_small and has_fast_bfloat16(device) else torch.float32


def _path(given: str | Path, what: str) -> Path:
    """Return a path that can be looked at; raises :class:`ModelError` for a broken link, and for what is no path."""
    try:
        if "\0" in str(given):
            raise ValueError("a path has no NUL character")
        refuse_broken_link(Path(given))
        Path(given).exists()
    except (OSError, ValueError) as error:
        raise ModelError(f"no {what} at {shown(str(given))}: {error.args[-1]}") from error
    return Path(given)


def _open_vae(path: Path, dtype: torch.dtype | None, variant: str | None, allow_pickle: bool) -> VAE:
    """Open a VAE of its own: a diffusers folder, or a single file."""
    if path.is_file():
        return open_vae_file(path, dtype, allow_pickle)
    if not is_there(path / "config.json"):
        raise ModelError(f"no VAE at {path}: expected a file, or a folder with a config.json")
    return VAE.from_pretrained(path, dtype, variant, allow_pickle)


def _download(name: str, variant: str | None, allow_pickle: bool) -> Path:
    """Download a Hub repository into the local cache, where it is not there yet; returns its folder."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ModelError(f"no file or folder at {name}; to open it from the Hub, pip install 'gobelin[hub]'") from error
    suffixes = ("safetensors", "bin") if allow_pickle else ("safetensors",)
    patterns = [*_CONFIG_PATTERNS]
    for network, suffix in product(NETWORKS, suffixes):
        # A variant stands before the suffix, after a dot; shards have "-of-" instead.
        names = [f"*.{variant}*"] if variant else _WEIGHT_STEMS
        patterns += [f"{network}/{stem}.{suffix}" for stem in names]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"no file or folder at {name}, and the Hub does not give it: {error}") from error
