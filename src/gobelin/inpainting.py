"""Image-to-image and inpainting: an image to begin from, and a mask of what to paint anew in it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gobelin.denoiser import ComposableDenoiser
from gobelin.images import WHITE_FROM, images_to_tensor, tensor_to_levels
from gobelin.samplers import DenoiserOutput
from gobelin.types import Images, Latents, Mask


@dataclass(frozen=True, kw_only=True)
class InitImage:
    """The images that painting begins from, in [-1, 1], and their masks: 1 is painted anew, 0 stays.

    ``digests`` tell the images and masks that were given apart from others.
    """

    images: Images
    mask: Mask | None
    digests: list[dict[str, str]]

    @classmethod
    def of(
        cls, images: Sequence[Image.Image], masks: Sequence[Image.Image] | None, size: tuple[int, int]
    ) -> "InitImage":
        """Resize images, and masks of them, to ``size`` (height, width); Lanczos, as diffusers does."""
        height, width = size
        resized = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
        mask = None
        digests = [{"init_image": digest(image)} for image in images]
        if masks is not None:
            grey = [one.resize((width, height), Image.Resampling.LANCZOS) for one in masks]
            mask = torch.from_numpy(np.stack([np.asarray(one) >= WHITE_FROM for one in grey])).float()[:, None]
            digests = [known | {"mask": digest(one)} for known, one in zip(digests, masks, strict=True)]
        return cls(images=images_to_tensor(resized), mask=mask, digests=digests)

    def mask_latents(self, latent_size: tuple[int, int]) -> Mask | None:
        """Resize the mask to the latents' grid."""
        return None if self.mask is None else F.interpolate(self.mask, size=latent_size)

    @property
    def masked_images(self) -> Images:
        """The images, grey where they are painted anew: what an inpainting U-Net sees of them."""
        assert self.mask is not None
        return self.images * (self.mask < 0.5)

    def paste(self, index: int, painted: Image.Image) -> Image.Image:
        """Put the pixels outside of the mask back into a painted image, bit for bit."""
        if self.mask is None:
            return painted
        before = tensor_to_levels(self.images[index : index + 1])[0]
        anew = self.mask[index, 0].bool().numpy()[:, :, None]
        return Image.fromarray(np.where(anew, np.asarray(painted), before))


@dataclass(frozen=True)
class Inpainting:
    """A denoiser whose latents outside of the mask are the image's, at each step's own noise level.

    ``around(latents, ᾱ)`` says what they are there. This is how a U-Net that sees no mask inpaints.
    """

    denoise: ComposableDenoiser
    mask: Mask
    around: Callable[[Latents, float], Latents]

    def __call__(self, latents: Latents, timestep: float, alpha_cumprod: float) -> DenoiserOutput:
        return self.denoise(self._restored(latents, alpha_cumprod), timestep, alpha_cumprod)

    def finish(self, latents: Latents) -> Latents:
        return self.denoise.finish(self._restored(latents, 1.0))

    def _restored(self, latents: Latents, alpha_cumprod: float) -> Latents:
        return (1 - self.mask) * self.around(latents, alpha_cumprod) + self.mask * latents


def noised_image(clean: Latents, noise: Latents) -> Callable[[Latents, float], Latents]:
    """Surroundings from an image: its latents under the noise that painting starts with; all is painted at first."""
    calls = count()

    def around(latents: Tensor, alpha_cumprod: float) -> Tensor:
        first = next(calls) == 0  # diffusers too puts the image back after the first step only
        return latents if first else math.sqrt(alpha_cumprod) * clean + math.sqrt(1 - alpha_cumprod) * noise

    return around


def source_images(latents: Latents, alpha_cumprod: float) -> Latents:
    """Surroundings of an edit: the first half of the batch, which is the images as they are."""
    return latents.chunk(2)[0].repeat(2, 1, 1, 1)


def digest(image: Image.Image) -> str:
    """Compute the first digits of the SHA-256 of an image's pixels, by which it is told apart from others."""
    return sha256(repr((image.size, image.mode)).encode() + image.tobytes()).hexdigest()[:16]
