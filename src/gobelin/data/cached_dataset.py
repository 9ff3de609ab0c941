"""A dataset read once for training: captions and, if they fit, images kept in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from gobelin.data.dataset import Dataset

MAX_CACHED_BYTES = 4 * 2**30  # 350,000 images of 64×64


class CachedDataset:
    """Read every entry of ``dataset`` and keep ``captions``, hard ``negatives``, and images as tensors.

    Images are cached as bytes while all of them take at most 4 GiB; beyond that each is read again when it is used.
    ``advance`` is called after each entry, for a progress bar.
    """

    def __init__(self, dataset: Dataset, advance: Callable[[], None] = lambda: None):
        self.size = dataset.size
        self.captions: list[tuple[str, ...]] = []
        self.negatives: list[tuple[str, ...]] = []
        self._dataset = dataset
        fits = len(dataset) * dataset.size**2 * 3 <= MAX_CACHED_BYTES
        self._cache = np.empty((len(dataset), dataset.size, dataset.size, 3), np.uint8) if fits else None
        for index in range(len(dataset)):
            entry = dataset[index]
            self.captions.append(entry.captions)
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

    def unique_captions(self) -> tuple[list[str], "CaptionIndex"]:
        """List every caption once, and for each image the indices of its captions in that list."""
        indices = {caption: index for index, caption in enumerate(dict.fromkeys(chain.from_iterable(self.captions)))}
        counts = torch.tensor([len(captions) for captions in self.captions])
        rows = torch.tensor([indices[caption] for captions in self.captions for caption in captions])
        return list(indices), CaptionIndex(rows=rows, starts=counts.cumsum(0) - counts, counts=counts)


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionIndex:
    """The captions of each image, by their indices in a list: ``rows`` of all images one after the other."""

    rows: Int[Tensor, " captions"]
    starts: Int[Tensor, " images"]
    counts: Int[Tensor, " images"]

    def pick(self, images: Int[Tensor, " batch"], generator: Generator) -> Int[Tensor, " batch"]:
        """Pick a caption of each image: its only one, or any of them, drawn where some image has several."""
        if len(self.rows) == len(self.counts):
            return self.rows[images]
        drawn = torch.rand(len(images), generator=generator) * self.counts[images]
        return self.rows[self.starts[images] + drawn.long()]
