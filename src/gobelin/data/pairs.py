"""(text, image) pairs: what every source of training data hands over."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """One captioned image: ``image`` is uint8 RGB [size, size, 3].

    ``negatives`` are captions that are wrong about it in one respect, where the source knows any.
    """

    image: NDArray[np.uint8]
    caption: str
    negatives: tuple[str, ...] = ()


@runtime_checkable
class Pairs(Protocol):
    """A fixed, indexed set of pairs; the same index always gives the same pair."""

    @property
    def description(self) -> str:
        """One line for people: what this is, how many there are, what was left out."""
        ...

    @property
    def size(self) -> int:
        """Height and width of every image, in pixels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...
