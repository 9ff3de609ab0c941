"""Exact order and per-sample randomness: which images a step trains on, and every random number it draws.

Both are pure functions of (seed, stage, step, row of the batch), so that a run is the same however it is cut into
processes, micro-batches, worker threads and resumed parts.
"""

from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Generator, Tensor


def derive_seed(seed: int, purpose: str, number: int) -> int:
    """Derive an independent seed for every purpose and number from the run's seed."""
    return crc32(f"{seed}/{purpose}/{number}".encode()) | seed << 32 & 0x7FFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """The order in which a stage sees the images of a dataset: every epoch anew, each image once.

    With several ``buckets`` (the bucket of each image) a batch has images of one alone; the last batch of a bucket is
    filled up from its beginning, so that no image is left out.
    """

    seed: int
    stage: str
    batch_size: int
    dataset_size: int
    buckets: UInt8[np.ndarray, " images"] | None = None

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every image is seen once."""
        if self.buckets is None:
            return self.dataset_size / self.batch_size
        return float(sum(-(-count // self.batch_size) for count in np.bincount(self.buckets).tolist()))

    def indices(self, step: int) -> Int[Tensor, " batch"]:
        """Select the images of a step."""
        if self.buckets is not None:
            epoch, row = divmod(step, int(self.steps_per_epoch))
            return self._bucket_batches(epoch)[row]
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.dataset_size
        parts = [
            _shuffled(self.dataset_size, self._epoch_seed(epoch))[positions[epochs == epoch] % self.dataset_size]
            for epoch in epochs.unique().tolist()
        ]
        return torch.cat(parts)

    def randoms(self, step: int, rows: slice) -> "list[np.random.Generator]":
        """Make the random generator of each sample in these rows of a step's batch."""
        key = crc32(f"{self.seed}/{self.stage}/sample".encode()) | self.seed << 32 & 0xFFFF_FFFF_FFFF_FFFF
        first = step * self.batch_size
        samples = range(first, first + self.batch_size)[rows]
        return [np.random.Generator(np.random.Philox(key=np.array([key, sample], np.uint64))) for sample in samples]

    def generator(self, step: int) -> Generator:
        """Make the random generator of what a whole batch shares, such as timesteps that are spread over it."""
        return Generator().manual_seed(derive_seed(self.seed, self.stage, step))

    def _epoch_seed(self, epoch: int) -> int:
        return derive_seed(self.seed, f"{self.stage}/order", epoch)

    @lru_cache(maxsize=2)  # noqa: B019 - an order lives as long as its stage
    def _bucket_batches(self, epoch: int) -> Int[Tensor, "steps batch"]:
        """Arrange an epoch: shuffled batches of each bucket, and these shuffled."""
        assert self.buckets is not None
        batches = []
        for bucket in np.unique(self.buckets).tolist():
            members = torch.from_numpy(np.flatnonzero(self.buckets == bucket))
            shuffled = members[_shuffled(len(members), derive_seed(self._epoch_seed(epoch), "bucket", bucket))]
            count = -(-len(members) // self.batch_size) * self.batch_size
            batches.append(shuffled.repeat(-(-count // len(members)))[:count].reshape(-1, self.batch_size))
        every = torch.cat(batches)
        return every[_shuffled(len(every), derive_seed(self._epoch_seed(epoch), "batches", 0))]


def normals(randoms: list[np.random.Generator], *shape: int) -> Float[Tensor, "batch ..."]:
    """Draw standard normal numbers, those of each sample from its own generator."""
    return torch.from_numpy(np.stack([random.standard_normal(shape, np.float32) for random in randoms]))


def uniforms(randoms: list[np.random.Generator]) -> Float[Tensor, " batch"]:
    """Draw a number in [0, 1) for each sample from its own generator."""
    return torch.tensor([random.random() for random in randoms])


@lru_cache(maxsize=4)  # an epoch, and its neighbours while it changes
def _shuffled(count: int, seed: int) -> Int[Tensor, " count"]:
    return torch.randperm(count, generator=Generator().manual_seed(seed))
