"""Procedural scenes as an image-text dataset."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from gobelin import scenes
from gobelin.data.dataset import CaptionedImage
from gobelin.errors import UsageError
from gobelin.scenes.world import SPLITS


@dataclass(frozen=True, kw_only=True)
class SceneDataset:
    """The first ``count`` scenes of a world's split: train, dev, test or heldout.

    Held-out combinations occur in the split "heldout" alone. Raises :class:`UsageError` for a count below 1, a
    negative seed or an unknown split.
    """

    world: scenes.World
    count: int
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"{self.count} scenes asked for: give 1 or more")
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}: give 0 or more")
        if self.split not in SPLITS:
            raise UsageError(f"unknown split {self.split!r}: the choices are {', '.join(SPLITS)}")

    @property
    def description(self) -> str:
        """One line for people: count, world and split."""
        return f"{self.count:,} scenes of the world {self.world.name!r} ({self.split})"

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of what the scenes follow from."""
        return hashlib.sha256(repr((self.world, self.count, self.seed, self.split)).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.world.size

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the images, in pixels: one for all."""
        return ((self.size, self.size),)

    @property
    def bucket_index(self) -> UInt8[np.ndarray, " images"]:
        """The bucket of each image: the only one."""
        return np.zeros(self.count, np.uint8)

    @property
    def hashes(self) -> "_SceneHashes":
        """A hash of what each scene follows from."""
        return _SceneHashes(self)

    @property
    def preprocessing_key(self) -> str:
        """Say that scenes are drawn at their size."""
        return f"scenes of {self.size}"

    def captions(self, index: int) -> tuple[str, ...]:
        """Draw the scene of an index for its caption."""
        return (self.sample(index).caption,)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> CaptionedImage:
        if not 0 <= index < self.count:
            raise IndexError(f"there is no scene {index}: the last is {self.count - 1}")
        sample = self.sample(index)
        negatives = scenes.hard_negatives(sample, index)
        return CaptionedImage(image=sample.image, captions=(sample.caption,), negatives=tuple(negatives))

    def sample(self, index: int) -> scenes.Sample:
        """Render the scene of an index, with its masks and words."""
        return scenes.sample(self.seed, index, self.world, self.split)


class _SceneHashes(Sequence[bytes]):
    """The hashes of a dataset's scenes, computed as they are asked for."""

    def __init__(self, dataset: SceneDataset):
        self._count = dataset.count
        self._source = repr((dataset.world, dataset.seed, dataset.split)).encode()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(self._count)[index]]
        return hashlib.sha256(self._source + b"/%d" % range(self._count)[index]).digest()


def find_world(name: str) -> scenes.World:
    """Look up a world by name; raises :class:`UsageError` with the choices."""
    if name not in scenes.WORLDS:
        raise UsageError(f"unknown world {name!r}: the choices are {', '.join(scenes.WORLDS)}")
    return scenes.WORLDS[name]
