"""Textual inversion files (Gal et al. 2022, arXiv 2208.01618): the embedding vectors of one new word.

Read are the original code's and AUTOMATIC1111's ``.pt`` (``string_to_param``), the ``.safetensors`` of AUTOMATIC1111
(``emb_params``), of OneTrainer (``emp_params``) and of Stable Diffusion XL's trainers as far as they fit (``clip_l``
alone), and diffusers' with the word as the key.
"""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from gobelin.errors import ModelError
from gobelin.formats.weights import open_tensors
from gobelin.validation import shown

# Keys that are not the word, in the order of the docstring; OneTrainer's second is of no use to other programs
# (``modules/modelSaver/stableDiffusion/StableDiffusionEmbeddingSaver.py``).
_ORIGINAL, _NAMELESS = "string_to_param.", ("emb_params", "emp_params", "clip_l", "*")
_OUTPUTS = ("emb_params_out", "emp_params_out")
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")  # their first bytes
# Text encoders by whose names trainers call the vectors for them, and the families that have them.
_OTHER_ENCODERS = {"clip_g": "Stable Diffusion XL", "t5": "Stable Diffusion 3 or Flux", "t5xxl": "Stable Diffusion 3"}


def read_textual_inversion(path: Path, allow_pickle: bool = False) -> tuple[str, Tensor]:
    """Read a textual inversion: its word (the file's name where it has none) and its vectors [n, width].

    Raises :class:`ModelError` for a file that is none, or another family's, and for vectors with NaN or infinity.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4).startswith(_PICTURES):
                raise ModelError(
                    f"{path} is a picture, into which AUTOMATIC1111 can put an embedding: give the embedding's own "
                    ".safetensors or .pt"
                )
    tensors = open_tensors(path, allow_pickle)
    key = find_vectors(tensors.shapes, path)
    word = path.stem if key in _NAMELESS or key.startswith(_ORIGINAL) else key
    return word, checked_vectors(tensors.read([key])[key], key, path)


def find_vectors(names: Collection[str], path: Path) -> str:
    """Find the name of a word's vectors among a file's tensors.

    Raises :class:`ModelError` where there are none, several, or those of text encoders that other families have.
    """
    names = [name for name in names if not name.startswith("string_to_token")]
    if other := [family for name, family in _OTHER_ENCODERS.items() if name in names]:
        raise ModelError(f"{path} is an embedding of {other[0]}, which Stable Diffusion 1.x cannot use")
    if output := [name for name in _OUTPUTS if name in names]:
        raise ModelError(
            f"{path} holds {output[0]!r}, OneTrainer's output embedding, which is added to what the text encoder says: "
            "train it without"
        )
    if any(name.startswith("bundle_emb.") for name in names):
        raise ModelError(f"{path} is a LoRA with embeddings in it: give it to load_lora (--lora)")
    if len(names) != 1:
        what = f"{len(names)} tensors, {shown(names[0])} first" if names else "no tensor"
        raise ModelError(f"{path} is not a textual inversion: it holds {what}, expected the vectors of one word")
    return names[0]


def checked_vectors(vectors: Tensor, name: str, path: Path) -> Tensor:
    """Return vectors as [n, width]; raises :class:`ModelError` for what is none, and for NaN and infinity."""
    if vectors.ndim not in (1, 2) or not vectors.numel() or not vectors.is_floating_point():
        what = f"{list(vectors.shape)} of {str(vectors.dtype).removeprefix('torch.')}"
        raise ModelError(f"{path} is not a textual inversion: {shown(name)} is {what}, expected vectors")
    if not torch.isfinite(vectors.sum(dtype=torch.float32)):
        raise ModelError(f"{path}: {shown(name)} holds NaN or infinity: the file is damaged, or its training was")
    return vectors.reshape(-1, vectors.shape[-1])
