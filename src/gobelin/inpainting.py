"""What painting can begin from: a picture, and a mask of what of it to paint anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gobelin.errors import UsageError

Pictures = Image.Image | Sequence[Image.Image]


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Pictures in [-1, 1], one for each that is painted, and where to paint: 1 there, 0 where they are to stay.

    ``digests`` tell the pictures that were given apart from others.
    """

    images: Float[Tensor, "batch 3 height width"]
    mask: Float[Tensor, "batch 1 height width"] | None
    strength: float
    digests: list[dict[str, str]]

    def holes(self, latent_size: tuple[int, int]) -> Float[Tensor, "batch 1 h w"] | None:
        """The mask on the latents' grid."""
        return None if self.mask is None else F.interpolate(self.mask, size=latent_size)

    @property
    def masked(self) -> Float[Tensor, "batch 3 height width"]:
        """The pictures, grey where they are to be painted."""
        assert self.mask is not None
        return self.images * (self.mask < 0.5)

    def kept(self, index: int, painted: Image.Image) -> Image.Image:
        """A painted picture whose other pixels are those of the one before, bit for bit."""
        if self.mask is None:
            return painted
        before = ((self.images[index] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        hole = self.mask[index, 0].bool().numpy()[:, :, None]
        return Image.fromarray(np.where(hole, np.asarray(painted), before))


def canvas(init_image: Pictures, mask: Pictures | None, strength: float, total: int, size: tuple[int, int]) -> Canvas:
    """A canvas of ``size`` (height, width) for so many pictures, from one that is given for all or one for each.

    White in a mask is painted, black stays. Pictures of another size are resized (Lanczos).
    """
    height, width = size
    pictures = _one_each(init_image, total, "init_image")
    masks = None if mask is None else _one_each(mask, total, "mask")
    resized = [picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    images = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in resized]).float() / 127.5 - 1
    holes = None
    if masks is not None:
        grey = [one.convert("L").resize((width, height), Image.Resampling.LANCZOS) for one in masks]
        holes = (torch.stack([torch.from_numpy(np.array(one))[None] for one in grey]).float() / 255 >= 0.5).float()
    digests = [{"init_image": digest(one)} for one in pictures]
    if masks is not None:
        digests = [known | {"mask": digest(one)} for known, one in zip(digests, masks, strict=True)]
    return Canvas(images=images, mask=holes, strength=strength, digests=digests)


def _one_each(given: Pictures, total: int, name: str) -> list[Image.Image]:
    pictures = [given] * total if isinstance(given, Image.Image) else list(given)
    if len(pictures) != total:
        raise UsageError(
            f"{len(pictures)} pictures given as {name} for {total} to paint: give one for all, or one each"
        )
    return pictures


def digest(picture: Image.Image) -> str:
    """The first digits of the SHA-256 of a picture's pixels, by which it is told apart from others."""
    return sha256(repr((picture.size, picture.mode)).encode() + picture.tobytes()).hexdigest()[:16]
