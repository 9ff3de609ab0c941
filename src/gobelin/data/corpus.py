"""A set of pairs made ready for training: read once, captions and (where they fit) images kept in memory."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gobelin.data.pairs import Pairs

IN_MEMORY_BYTES = 4 * 2**30


class Corpus:
    """Pairs by index: ``captions``, ``negatives``, and images as tensors.

    Images are kept as bytes while all of them take at most 4 GiB; beyond that they are read each time. ``advance``
    hears of every pair read, for a progress bar.
    """

    def __init__(self, pairs: Pairs, advance: Callable[[], None] = lambda: None):
        self.size = pairs.size
        self.captions: list[str] = []
        self.negatives: list[tuple[str, ...]] = []
        self._pairs = pairs
        fits = len(pairs) * pairs.size**2 * 3 <= IN_MEMORY_BYTES
        self._kept = np.empty((len(pairs), pairs.size, pairs.size, 3), np.uint8) if fits else None
        for index in range(len(pairs)):
            pair = pairs[index]
            self.captions.append(pair.caption)
            self.negatives.append(pair.negatives)
            if self._kept is not None:
                self._kept[index] = pair.image
            advance()

    def __len__(self) -> int:
        return len(self._pairs)

    def images(self, indices: Int[Tensor, " batch"]) -> Float[Tensor, "batch 3 height width"]:
        """Images in [-1, 1], on the CPU."""
        rows = indices.tolist()
        kept = self._kept
        pixels = np.stack([self._pairs[row].image for row in rows]) if kept is None else kept[rows]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1

    def distinct_captions(self) -> tuple[list[str], Int[Tensor, " samples"]]:
        """Every caption once, and for each pair the place of its caption among them."""
        places = {caption: place for place, caption in enumerate(dict.fromkeys(self.captions))}
        return list(places), torch.tensor([places[caption] for caption in self.captions])
