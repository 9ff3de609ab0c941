"""A dataset read once for training: captions and, if they fit, images kept in memory."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gobelin.data.dataset import Dataset

MAX_CACHED_BYTES = 4 * 2**30  # 350,000 images of 64×64


class CachedDataset:
    """Read every entry of ``dataset`` and keep ``captions``, hard ``negatives``, and images as tensors.

    Images are cached as bytes while all of them take at most 4 GiB; beyond that each is read again when it is used.
    ``advance`` is called after each entry, for a progress bar.
    """

    def __init__(self, dataset: Dataset, advance: Callable[[], None] = lambda: None):
        self.size = dataset.size
        self.captions: list[str] = []
        self.negatives: list[tuple[str, ...]] = []
        self._dataset = dataset
        fits = len(dataset) * dataset.size**2 * 3 <= MAX_CACHED_BYTES
        self._cache = np.empty((len(dataset), dataset.size, dataset.size, 3), np.uint8) if fits else None
        for index in range(len(dataset)):
            entry = dataset[index]
            self.captions.append(entry.caption)
            self.negatives.append(entry.negatives)
            if self._cache is not None:
                self._cache[index] = entry.image
            advance()

    def __len__(self) -> int:
        return len(self._dataset)

    def images(self, indices: Int[Tensor, " batch"]) -> Float[Tensor, "batch 3 size size"]:
        """Load images in [-1, 1], on the CPU."""
        rows = indices.tolist()
        cache = self._cache
        pixels = np.stack([self._dataset[row].image for row in rows]) if cache is None else cache[rows]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1

    def unique_captions(self) -> tuple[list[str], Int[Tensor, " images"]]:
        """List every caption once, and for each image the index of its caption in that list."""
        indices = {caption: index for index, caption in enumerate(dict.fromkeys(self.captions))}
        return list(indices), torch.tensor([indices[caption] for caption in self.captions])
