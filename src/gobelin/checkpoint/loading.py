"""Open a model, whatever shape it has: a folder, a single file, or a name on the Hub."""

import re
from itertools import product
from pathlib import Path

import torch

from gobelin.checkpoint.clip_tokenizer import find_tokenizer
from gobelin.checkpoint.diffusers_folder import MODEL_INDEX, open_folder
from gobelin.checkpoint.model import Model
from gobelin.checkpoint.single_file import open_single_file, open_vae_file
from gobelin.errors import ModelError, UsageError
from gobelin.tokenizer import Tokenizer
from gobelin.vae import VAE

# What of a repository is needed, and nothing else of it is fetched.
_WEIGHTS = ("unet", "vae", "text_encoder")
_WANTED = (
    "model_index.json",
    "gobelin.json",
    "scheduler/*.json",
    "tokenizer/*",
    *(f"{part}/*.json" for part in _WEIGHTS),
)


_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "*-of-*")


def open_model(
    path: str | Path,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    ema: bool = False,
) -> Model:
    """Open a diffusers folder, an original single file, or a repository of the Hub by its name ``owner/name``.

    ``dtype`` None is each file's own precision. ``tokenizer`` is the folder of one that takes the place of the model's
    own, or CLIP's; ``vae`` a folder or a file likewise. ``variant`` ("fp16") picks among a folder's files.
    ``allow_pickle`` allows ``.ckpt`` and ``.bin``: then tensors are read of them, and nothing else. ``ema`` takes the
    average of a single file's U-Net. Raises :class:`ModelError` that names the file and what is wrong with it.
    """
    there = Path(path)
    words = None if tokenizer is None else Tokenizer.from_pretrained(tokenizer)
    pictures = None if vae is None else _open_vae(Path(vae), dtype, variant, allow_pickle)
    if not there.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        there = _fetched(str(path), variant, allow_pickle)
    if there.is_file():
        if variant is not None:
            raise UsageError(f"variant is {variant!r}, but {there} is a single file: leave it out")
        return open_single_file(
            there,
            device,
            dtype,
            tokenizer=lambda: words or find_tokenizer(there),
            vae=pictures,
            allow_pickle=allow_pickle,
            ema=ema,
        )
    if not (there / MODEL_INDEX).is_file():
        raise ModelError(
            f"no model at {there}: expected a folder with a {MODEL_INDEX}, a .safetensors or .ckpt file, or a Hub name"
        )
    if ema:
        raise UsageError(f"ema is for single files, and {there} is a folder: leave it out")
    return open_folder(there, device, dtype, tokenizer=words, vae=pictures, variant=variant, allow_pickle=allow_pickle)


def _open_vae(path: Path, dtype: torch.dtype | None, variant: str | None, allow_pickle: bool) -> VAE:
    if path.is_file():
        return open_vae_file(path, dtype, allow_pickle)
    return VAE.from_pretrained(path, dtype, variant, allow_pickle)


def _fetched(name: str, variant: str | None, allow_pickle: bool) -> Path:
    """The folder of a Hub repository in the local cache, fetched first where it is not there yet."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ModelError(f"no file or folder at {name}; to open it from the Hub, pip install 'gobelin[hub]'") from error
    kinds = ("safetensors", "bin") if allow_pickle else ("safetensors",)
    wanted = [*_WANTED]
    for part, kind in product(_WEIGHTS, kinds):
        # Plain names have no dot before the ending, but for the numbers of shards.
        wanted += [f"{part}/*.{variant}*.{kind}"] if variant else [f"{part}/{stem}.{kind}" for stem in _STEMS]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"no file or folder at {name}, and the Hub does not give it: {error}") from error
