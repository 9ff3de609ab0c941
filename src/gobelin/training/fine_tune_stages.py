"""Stages of training from a model alone: beside the images of a prior, and with a mask."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gobelin.operations import Conv2d
from gobelin.training.losses import UNetBatch, UNetLoss
from gobelin.training.run_folder import Run
from gobelin.training.stages import UNetStage, mirrored
from gobelin.unet import UNet
from gobelin.vae import VAE

_ALL_MASKED = 0.25  # of images, as Stable Diffusion's inpainting model was trained (RunwayML's model card)


class WithPrior:
    """DreamBooth's prior preservation (Ruiz et al. 2023, arXiv 2208.12242, equation 2): as many images of the class.

    A step's batch is the ``stage``'s own and after it the ``prior``'s, whose squared errors count ``weight`` times.
    """

    is_divisible = True

    def __init__(self, stage: UNetStage, prior: UNetStage, weight: float):
        self.name, self.optim, self.module, self.lr_ratios = stage.name, stage.optim, stage.module, stage.lr_ratios
        self.evaluate: Callable[[UNetLoss, int, Run], Image.Image | None] = stage.evaluate
        self.describe = stage.describe
        self._stage, self._prior, self._weight = stage, prior, weight

    def batch(self, step: int, rows: slice) -> UNetBatch:
        """Make the rows of both batches."""
        own, prior = self._stage.batch(step, rows), self._prior.batch(step, rows)
        weights = torch.tensor([1.0] * len(own.latents) + [self._weight] * len(prior.latents))
        return UNetBatch(
            latents=torch.cat([own.latents, prior.latents]),
            noise=torch.cat([own.noise, prior.noise]),
            timesteps=torch.cat([own.timesteps, prior.timesteps]),
            texts=torch.cat([own.texts, prior.texts]),
            weights=weights,
            masks=_joined(own.masks, prior.masks, len(prior.latents)),
            tokens=_joined(own.tokens, prior.tokens, len(prior.latents)),
        )


def _joined(own: Tensor | None, prior: Tensor | None, count: int) -> Tensor | None:
    """Join what grounds both batches; a prior of ``count`` images without masks has groups of nothing."""
    if own is None:
        return None
    return torch.cat([own, own.new_zeros(count, *own.shape[1:]) if prior is None else prior])


class InpaintingStage(UNetStage):
    """Train a U-Net that sees a mask, and the latents of the image without what is masked."""

    def __init__(self, vae: VAE, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._vae = vae

    def batch(self, step: int, rows: slice) -> UNetBatch:
        """Make the batch, and draw a mask for each image: a box or an ellipse, or all of it."""
        made = super().batch(step, rows)
        indices = self.order.indices(step)[rows].tolist()
        *_, is_mirrored = self.choices(self.order.randoms(step, rows))
        images = mirrored(self.dataset.images(indices), is_mirrored)
        # Numbers of their own, so that those of the batch are the same as without a mask.
        randoms = [np.random.default_rng(random.integers(2**63, size=2)) for random in self.order.randoms(step, rows)]
        masks = torch.stack([draw_mask(random, *images.shape[-2:]) for random in randoms])[:, None]
        with torch.no_grad():
            seen = (images * (masks < 0.5)).to(self._vae.device)
            masked = self._vae.encode(seen).mean.float().cpu() * self._vae.config.scaling_factor
        small = F.interpolate(masks, size=masked.shape[-2:])
        return dataclasses.replace(made, masked=torch.cat([small, masked], dim=1))


def draw_mask(random: np.random.Generator, height: int, width: int) -> Float[Tensor, "height width"]:
    """Draw a mask: 1 within one to three boxes and ellipses of any size, or, for a quarter of images, everywhere."""
    if random.random() < _ALL_MASKED:
        return torch.ones(height, width)
    rows, columns = np.mgrid[0:height, 0:width]
    mask = np.zeros((height, width), bool)
    for _ in range(random.integers(1, 4)):
        centre, half = random.random(2) * (height, width), random.uniform(0.08, 0.4, 2) * (height, width)
        y, x = np.abs(rows - centre[0]) / half[0], np.abs(columns - centre[1]) / half[1]
        mask |= (y < 1) & (x < 1) if random.random() < 0.5 else y**2 + x**2 < 1
    return torch.from_numpy(mask).float()


def widen_for_mask_(unet: UNet, latent_channels: int) -> None:
    """Give a U-Net of latents the further input channels of a mask and masked latents, in place; their weights are 0.

    It predicts the same as before until they are trained. A U-Net that has them stays as it is.
    """
    channels = 2 * latent_channels + 1
    before = unet.conv_in
    if before.in_channels == channels:
        return
    after = Conv2d(channels, before.out_channels, 3, padding=1).to(before.weight)
    with torch.no_grad():
        after.weight.zero_()
        after.weight[:, :latent_channels] = before.weight
        assert after.bias is not None
        assert before.bias is not None
        after.bias.copy_(before.bias)
    unet.conv_in = after
    unet.config = dataclasses.replace(unet.config, in_channels=channels)
