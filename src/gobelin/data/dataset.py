"""The contract of an image-text dataset: captioned images by index."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import UInt8
from numpy import ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionedImage:
    """One image, uint8 RGB, with its captions, of which training takes any.

    ``negatives`` are hard negatives: captions that are wrong in one respect, if the source knows any.
    """

    image: UInt8[ndarray, "height width 3"]
    captions: tuple[str, ...]
    negatives: tuple[str, ...] = ()

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


@runtime_checkable
class Dataset(Protocol):
    """A fixed, indexed set of captioned images; the same index always gives the same one."""

    @property
    def description(self) -> str:
        """One line for people: the source, the number of images, and those left out."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of everything that is learned from: another one says that it is other data."""
        ...

    @property
    def size(self) -> int:
        """Height and width of a square image, in pixels."""
        ...

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each bucket, in pixels: the sizes that images come in."""
        ...

    @property
    def bucket_index(self) -> UInt8[ndarray, " images"]:
        """The bucket of each image, as its place in ``sizes``."""
        ...

    @property
    def hashes(self) -> Sequence[bytes]:
        """A hash of each image's content, by which what was computed from it is found again."""
        ...

    @property
    def preprocessing_key(self) -> str:
        """Everything that decides how the content of an image becomes pixels."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Read the captions of an image, without the image."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CaptionedImage: ...
