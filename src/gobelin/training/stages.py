"""Training stages with gradients: text encoder, VAE, U-Net. Each has its loss, its batches, and what it shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from gobelin.clip import ImageEncoder, TextEncoder
from gobelin.data.batches import Order, normals, uniforms
from gobelin.data.cached_dataset import CachedDataset
from gobelin.data.scene_groups import GroundingCache
from gobelin.images import tensor_to_images
from gobelin.tokenizer import Tokenizer
from gobelin.training.config import DiffusionConfig, TextStageConfig, VAELossConfig
from gobelin.training.losses import TextBatch, TextLoss, UNetBatch, UNetLoss, VAEBatch, VAELoss
from gobelin.training.run_folder import Run
from gobelin.vae import VAE

ReadLatents: TypeAlias = Callable[
    [Int[Tensor, " batch"], Bool[Tensor, " batch"]],
    tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch channels h w"]],
]
"""Read (mean, standard deviation) of unscaled latents by index, where asked of the mirrored image."""


class _Stage:
    """A dataset in an exact order: the part that all stages have in common."""

    name: str

    def __init__(self, dataset: CachedDataset, batch_size: int, seed: int):
        self.dataset = dataset
        self.order = Order(
            seed=seed,
            stage=self.name,
            batch_size=batch_size,
            dataset_size=len(dataset),
            buckets=dataset.bucket_index if len(dataset.sizes) > 1 else None,
        )

    def describe(self, step: int) -> str:
        """Name the first samples of a step's batch, for an error."""
        indices = self.order.indices(step)[:3].tolist()
        captions = ", ".join(repr(self.dataset.captions(index)[0][:40]) for index in indices)
        return f"images {', '.join(map(str, indices))}… ({captions}…)"


class TextStage(_Stage):
    """Train the text encoder with an image encoder: :class:`~gobelin.training.losses.TextLoss`.

    Each image also gets one hard negative caption if the dataset has any for it. The loss compares the images of a
    batch, so every process takes all of it.
    """

    name = "text_encoder"
    is_divisible = False

    def __init__(
        self,
        dataset: CachedDataset,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder,
        config: TextStageConfig,
        seed: int,
        flip: bool = False,
    ):
        super().__init__(dataset, config.optim.batch_size, seed)
        self.optim = config.optim
        self.lr_ratios = {"text.": config.text_lr_ratio}
        self.module = TextLoss(text_encoder, image_encoder, config)
        self._tokenizer, self._flip = tokenizer, flip

    def batch(self, step: int, rows: slice) -> TextBatch:
        """Read images with one caption each, and the hard negatives of those that have any."""
        indices = self.order.indices(step)[rows].tolist()
        randoms = self.order.randoms(step, rows)
        picks = uniforms(randoms).tolist()
        captions = [_pick(self.dataset.captions(index), pick) for index, pick in zip(indices, picks, strict=True)]
        picks = uniforms(randoms).tolist()
        hard = [self.dataset.negatives(index) for index in indices]
        negatives = [_pick(texts, pick) for texts, pick in zip(hard, picks, strict=True) if texts]
        return TextBatch(
            images=mirrored(self.dataset.images(indices), (uniforms(randoms) < 0.5) & self._flip),
            token_ids=self._tokenizer([*captions, *negatives]),
        )

    def evaluate(self, module: TextLoss, step: int, run: Run) -> None:
        """Show nothing: a text encoder has no images."""
        return None


class VAEStage(_Stage):
    """Train the VAE: :class:`~gobelin.training.losses.VAELoss`. ``shown`` is the number of images in the sample sheet.

    A ``fresh`` VAE begins with a narrow posterior.
    """

    name = "vae"
    is_divisible = True

    def __init__(
        self,
        dataset: CachedDataset,
        vae: VAE,
        config: VAELossConfig,
        seed: int,
        shown: int,
        fresh: bool = True,
        flip: bool = False,
    ):
        super().__init__(dataset, config.optim.batch_size, seed)
        self.optim = config.optim
        self.lr_ratios: dict[str, float] = {}
        self.module = VAELoss(vae, config)
        self._latent_channels, self._factor = vae.config.latent_channels, vae.config.factor
        self._shown, self._flip = images_of_one_size(dataset, shown), flip
        if fresh:
            _init_posterior_(vae)

    def batch(self, step: int, rows: slice) -> VAEBatch:
        """Read images, and draw their noise."""
        images = self.dataset.images(self.order.indices(step)[rows].tolist())
        randoms = self.order.randoms(step, rows)
        shape = (self._latent_channels, images.shape[2] // self._factor, images.shape[3] // self._factor)
        noise = normals(randoms, *shape), normals(randoms, *shape)
        images = mirrored(images, (uniforms(randoms) < 0.5) & self._flip)
        return VAEBatch(images=images, posterior_noise=noise[0], latent_noise=noise[1])

    def evaluate(self, module: VAELoss, step: int, run: Run) -> Image.Image | None:
        """Draw the shown images above their reconstructions."""
        if not self._shown:
            return None
        images = self.dataset.images(self._shown).to(module.vae.device)
        both = torch.cat([images, module.vae.decode(module.vae.encode(images).mode())])
        return image_grid(tensor_to_images(both), columns=len(images))


@dataclass(frozen=True, kw_only=True)
class HalfSize:
    """Latents of images of half the height and width, which the first ``steps`` train on."""

    latents: ReadLatents
    steps: int


class UNetStage(_Stage):
    """Train the U-Net on cached latents: :class:`~gobelin.training.losses.UNetLoss`.

    ``scaling_factor`` is the VAE's. ``texts`` makes text embeddings of captions, or token ids if the module encodes
    them. ``show`` measures and draws the module; ``grounding`` has the masks that its loss may ask for.
    """

    name = "unet"
    is_divisible = True

    def __init__(
        self,
        module: UNetLoss,
        dataset: CachedDataset,
        latents: ReadLatents,
        scaling_factor: float,
        texts: Callable[[list[str]], Float[Tensor, "texts length dim"] | Int[Tensor, "texts length"]],
        config: DiffusionConfig,
        seed: int,
        show: Callable[[UNetLoss, int, Run], Image.Image | None],
        flip: bool = False,
        grounding: GroundingCache | None = None,
        half_size: HalfSize | None = None,
    ):
        super().__init__(dataset, config.optim.batch_size, seed)
        self.optim = config.optim
        self._grounding = grounding
        self._half_size = half_size
        # A new word is in the text encoder too, and learns at the rate itself.
        self.lr_ratios = {"text_encoder.": config.text_lr_ratio} if config.train_text_encoder else {}
        self.module = module
        self._schedule = module.schedule
        self._latents, self._scaling_factor, self._texts = latents, scaling_factor, texts
        self._config, self._flip = config, flip
        self._show = show

    def batch(self, step: int, rows: slice) -> UNetBatch:
        """Read latents with one caption each or none, and draw noise and timesteps.

        Timesteps are spread over the whole batch; all else is drawn for each sample alone.
        """
        indices = self.order.indices(step)[rows]
        randoms = self.order.randoms(step, rows)
        timesteps = self._timesteps(self.order.generator(step))[rows]
        dropped, picks, is_mirrored = self.choices(randoms)
        captions = [
            "" if drop < self._config.caption_dropout else _pick(self.dataset.captions(index), pick)
            for index, drop, pick in zip(indices.tolist(), dropped.tolist(), picks.tolist(), strict=True)
        ]
        half_size = self._half_size if self._half_size is not None and step < self._half_size.steps else None
        means, stds = (self._latents if half_size is None else half_size.latents)(indices, is_mirrored)
        shape = means.shape[1:]
        latents = (means + stds * normals(randoms, *shape)) * self._scaling_factor
        noise = normals(randoms, *shape)
        if self._config.offset_noise:
            noise = noise + self._config.offset_noise * normals(randoms, shape[0], 1, 1)
        batch = UNetBatch(latents=latents, noise=noise, timesteps=timesteps, texts=self._texts(captions))
        if self._grounding is None:
            return batch
        masks, tokens = self._grounding.read(indices)
        has_words = torch.tensor([bool(caption) for caption in captions])
        masks = torch.where(is_mirrored[:, None, None, None], masks.flip(-1), masks)
        masks = masks if half_size is None else F.avg_pool2d(masks, 2)
        return replace(batch, masks=masks, tokens=tokens & has_words[:, None, None])

    def choices(
        self, randoms: list[np.random.Generator]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Draw for each sample, first of all: a number for the dropout, one for the caption, whether it is mirrored."""
        dropped, picks, drawn = (uniforms(randoms) for _ in range(3))
        return dropped, picks, (drawn < 0.5) & self._flip

    def _timesteps(self, generator: torch.Generator) -> Int[Tensor, " batch"]:
        """Sample timesteps, stratified over the batch and shifted towards noise.

        Esser et al. 2024, arXiv 2403.03206, eq. 23; measured in "Timesteps shifted towards noise", docs/decisions.md.
        """
        count, last = self._config.optim.batch_size, self._schedule.config.num_train_timesteps
        even = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        shift = self._config.timestep_shift
        return (shift * even / (1 + (shift - 1) * even) * last).long().clamp(max=last - 1)

    def evaluate(self, module: UNetLoss, step: int, run: Run) -> Image.Image | None:
        """Measure and draw the module."""
        return self._show(module, step, run)


@torch.no_grad()
def encode_texts(
    text_encoder: TextEncoder, tokenizer: Tokenizer, texts: list[str]
) -> Float[Tensor, "texts length dim"]:
    """Encode texts to text embeddings, on the encoder's device."""
    return text_encoder(tokenizer(texts).to(text_encoder.device))


def mirrored(
    images: Float[Tensor, "batch 3 height width"], which: Bool[Tensor, " batch"]
) -> Float[Tensor, "batch 3 height width"]:
    """Mirror some of the images, left to right."""
    return torch.where(which[:, None, None, None], images.flip(-1), images)


def images_of_one_size(dataset: CachedDataset, count: int) -> list[int]:
    """List the first images of the bucket that has most, which can be read together."""
    most = int(np.bincount(dataset.bucket_index).argmax())
    return np.flatnonzero(dataset.bucket_index == most)[:count].tolist()


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange images of one size in a grid, row by row, two pixels apart on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * (width + 2), index // columns * (height + 2)))
    return grid


def _pick(captions: Sequence[str], drawn: float) -> str:
    """Pick one of several captions by a number in [0, 1)."""
    return captions[int(drawn * len(captions))]


def _init_posterior_(vae: VAE, logvar: float = -6.0) -> None:
    """Start with a narrow posterior: a wide one drowns small details before the decoder has learned any.

    The value is that of "The VAE's loss, and its noise" in docs/decisions.md.
    """
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[channels:].zero_()
        assert vae.quant_conv.bias is not None
        vae.quant_conv.bias[channels:].fill_(logvar)
