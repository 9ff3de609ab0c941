"""Part of a dataset: some of its images, such as those held out of training."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from gobelin.data.dataset import CaptionedImage, Dataset

_MOST_HELD_OUT = 10  # of so many images, one
FEWEST_HELD_OUT = 16
"""Images that are held out at least: with fewer, a standard error is itself known to no better than a fifth."""


class Subset:
    """The images of a ``dataset`` in these ``rows``, with a :class:`Dataset`'s contract."""

    def __init__(self, dataset: Dataset, rows: Int[np.ndarray, " images"]):
        self._dataset, self._rows = dataset, rows
        self.description, self.size, self.sizes = dataset.description, dataset.size, dataset.sizes
        self.preprocessing_key = dataset.preprocessing_key
        self.bucket_index: UInt8[np.ndarray, " images"] = dataset.bucket_index[rows]

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of the whole and of the rows."""
        return hashlib.sha256(self._dataset.fingerprint.encode() + self._rows.tobytes()).hexdigest()

    @property
    def hashes(self) -> Sequence[bytes]:
        """The hashes of the images' content."""
        return _Rows(self._dataset.hashes, self._rows)

    def captions(self, index: int) -> tuple[str, ...]:
        """Read the captions of an image, without the image."""
        return self._dataset.captions(int(self._rows[index]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> CaptionedImage:
        return self._dataset[int(self._rows[index])]


def split_held_out(dataset: Dataset, count: int) -> tuple[Dataset, Dataset | None]:
    """Hold out ``count`` images of a dataset, at most a tenth: (the others, the held-out ones, None for none).

    They are those with the smallest hashes: the same ones whatever the files are called. Images that are there twice
    stay together on one side. Fewer than :data:`FEWEST_HELD_OUT` tell nothing and are not held out.
    """
    count = min(count, len(dataset) // _MOST_HELD_OUT)
    if count < FEWEST_HELD_OUT:
        return dataset, None
    hashes = np.frombuffer(b"".join(hashlib.sha256(one).digest()[:8] for one in dataset.hashes), "<u8")
    held_out = hashes <= np.partition(hashes, count - 1)[count - 1]
    return Subset(dataset, np.flatnonzero(~held_out)), Subset(dataset, np.flatnonzero(held_out))


class _Rows(Sequence[bytes]):
    """Some values of a sequence, read as they are asked for."""

    def __init__(self, values: Sequence[bytes], rows: Int[np.ndarray, " images"]):
        self._values, self._rows = values, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._values[int(row)] for row in self._rows[index]]
        return self._values[int(self._rows[index])]
