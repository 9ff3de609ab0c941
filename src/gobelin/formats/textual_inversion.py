"""Textual inversion files (Gal et al. 2022, arXiv 2208.01618): the embedding vectors of one new word.

Three layouts are read: AUTOMATIC1111's ``.pt`` and ``.safetensors``, and diffusers' with the word as the key.
"""

from pathlib import Path

import torch
from torch import Tensor

from gobelin.errors import ModelError
from gobelin.formats.weights import open_tensors

# AUTOMATIC1111's keys, in .pt and in .safetensors files: neither is the word.
_A1111_KEYS = ("string_to_param.*", "emb_params")


def read_textual_inversion(path: Path, allow_pickle: bool = False) -> tuple[str, Tensor]:
    """Read a textual inversion: its word (the file's name where it has none) and its vectors [n, width].

    Raises :class:`ModelError` for a file that is none, and for vectors with NaN or infinity.
    """
    file = open_tensors(path, allow_pickle)
    names = [name for name in file.shapes if not name.startswith("string_to_token")]
    if len(names) != 1:
        what = f"{len(names)} tensors, {names[0]!r} first" if names else "no tensor"
        raise ModelError(f"{path} is not a textual inversion: it holds {what}, expected the vectors of one word")
    vectors = file.read(names)[names[0]]
    if vectors.ndim not in (1, 2) or not vectors.numel():
        raise ModelError(f"{path} is not a textual inversion: {names[0]!r} is {list(vectors.shape)}, expected vectors")
    if not torch.isfinite(vectors.sum(dtype=torch.float32)):
        raise ModelError(f"{path}: {names[0]!r} holds NaN or infinity: the file is damaged, or its training was")
    word = path.stem if names[0] in _A1111_KEYS else names[0]
    return word, vectors.reshape(-1, vectors.shape[-1])
