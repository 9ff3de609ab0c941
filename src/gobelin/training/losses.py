"""Losses of the training stages: modules that hold the networks, and whose ``forward`` takes a batch.

A module is what processes, compilers and optimizers are put on, so that none of them is known here.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gobelin.clip import ImageEncoder, TextEncoder, contrastive_loss
from gobelin.layers import Attention
from gobelin.schedule import NoiseSchedule
from gobelin.training import distributed
from gobelin.training.config import TextStageConfig, VAELossConfig
from gobelin.training.grounding import grounding_loss, is_grounded
from gobelin.unet import UNet
from gobelin.vae import VAE

_LEAST_VARIANCE = 1e-4  # of colours in [-1, 1], about 1 of 255 levels: a batch of one image twice has none


class _Batch:
    """Tensors of some samples, which move together."""

    def to(self, device: torch.device) -> Self:
        """Move every tensor to a device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items() if value is not None}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextBatch(_Batch):
    """Images in [-1, 1], and the token ids of their captions and then of the hard negatives."""

    images: Float[Tensor, "batch 3 height width"]
    token_ids: Int[Tensor, "texts length"]


@dataclass(frozen=True, kw_only=True, eq=False)
class VAEBatch(_Batch):
    """Images in [-1, 1], the noise of their posteriors, and the noise added to their latents."""

    images: Float[Tensor, "batch 3 height width"]
    posterior_noise: Float[Tensor, "batch channels h w"]
    latent_noise: Float[Tensor, "batch channels h w"]


@dataclass(frozen=True, kw_only=True, eq=False)
class UNetBatch(_Batch):
    """Latents, scaled, the noise and timestep of each, and its text: text embeddings, or token ids to encode.

    ``weights`` are those of the samples in the loss; ``masked`` are the further channels of an inpainting U-Net: the
    mask, and the latents of the masked image. ``masks`` are shares of patches that groups of objects cover, and
    ``tokens`` those of the text that speak of them (:mod:`gobelin.data.scene_groups`).
    """

    latents: Float[Tensor, "batch channels h w"]
    noise: Float[Tensor, "batch channels h w"]
    timesteps: Int[Tensor, " batch"]
    texts: Float[Tensor, "batch length dim"] | Int[Tensor, "batch length"]
    weights: Float[Tensor, " batch"] | None = None
    masked: Float[Tensor, "batch channels_of_mask h w"] | None = None
    masks: Float[Tensor, "batch groups h w"] | None = None
    tokens: Bool[Tensor, "batch groups length"] | None = None


class SketchHead(nn.Module):
    """Predict the colours of 8×8 patches from text embeddings alone: learned queries attend to the words.

    The task is a U-Net's in pure noise, without the U-Net ("The text encoder sketches" in docs/decisions.md). The head
    trains the text encoder and is then discarded.
    """

    side = 8

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(self.side**2, width) / 2)
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads=heads)
        self.colours = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))

    def forward(
        self, text_embeddings: Float[Tensor, "batch length dim"], mask: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch 3 8 8"]:
        """Predict colours in [-1, 1]; ``mask`` is True for BOS and the words, False for EOS and padding."""
        queries = self.queries.expand(len(text_embeddings), -1, -1)
        colours = self.colours(queries + self.attention(self.norm(queries), text_embeddings, mask))
        return rearrange(colours, "b (y x) c -> b c y x", y=self.side)

    def loss(
        self,
        text_embeddings: Float[Tensor, "batch length dim"],
        mask: Bool[Tensor, "batch length"],
        images: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, ""]:
        """Compute the squared error against images in [-1, 1], as a fraction of the colours' variance in the batch."""
        colours = F.interpolate(images, size=(self.side, self.side), mode="area")
        error = self(text_embeddings, mask).float() - colours
        variance = distributed.concat_rows(colours.flatten(1)).var(dim=0).mean()
        return error.square().mean() / variance.clamp(min=_LEAST_VARIANCE)


class TextLoss(nn.Module):
    """CLIP's contrastive loss over (image, caption) pairs, and the sketch loss, of a text and an image encoder.

    Several processes encode their shards of a batch each, and contrast the pairs of all: the loss is the whole batch's.
    Captions of the same tokens are one.
    """

    def __init__(self, text: TextEncoder, image: ImageEncoder, config: TextStageConfig):
        super().__init__()
        self.text = text
        self.image = image
        self.sketch = SketchHead(text.config.hidden_size, text.config.num_attention_heads)
        self.config = config

    def forward(self, batch: TextBatch) -> dict[str, Float[Tensor, ""]]:
        """Compute the loss, its two terms, and the accuracy of finding each image's caption in the batch."""
        images, own = batch.images, len(batch.images)
        mask = batch.token_ids != self.text.config.eos_token_id
        token_ids = batch.token_ids[:, : int(mask.sum(dim=1).max()) + 1]
        text_embeddings = self.text(token_ids)
        texts = self.image.project_text(self.text.pooled(token_ids, text_embeddings))
        captions, negatives = distributed.concat_rows(texts[:own]), distributed.concat_rows(texts[own:])
        logits = self.image.similarity(distributed.concat_rows(self.image(images)), torch.cat([captions, negatives]))
        said = distributed.concat_rows(batch.token_ids[:own].float())  # exact: token ids are small
        same, count = (said[:, None] == said).all(dim=-1), len(said)
        found = logits.argmax(dim=1)
        right = (found < count) & same.gather(1, found.clamp(max=count - 1)[:, None])[:, 0]
        contrast = contrastive_loss(logits, same)
        pairs = slice(own)  # without the hard negatives
        sketch = self.sketch.loss(text_embeddings[pairs], mask[pairs, : token_ids.shape[1]], images)
        return {
            "loss": contrast + self.config.sketch * sketch,
            "contrast": contrast,
            "sketch": sketch,
            "accuracy": right.float().mean(),
        }


class VAELoss(nn.Module):
    """Squared errors that weigh colour most, and a KL term small enough to keep every latent channel.

    The weights are those of "The VAE's loss, and its noise" in docs/decisions.md.
    """

    def __init__(self, vae: VAE, config: VAELossConfig):
        super().__init__()
        self.vae = vae
        self.config = config

    def forward(self, batch: VAEBatch) -> dict[str, Float[Tensor, ""]]:
        """Compute the loss, its terms, and the posterior's largest noise-to-signal ratio among the latent channels."""
        config, images = self.config, batch.images
        posterior = self.vae.encode(images)
        latents = posterior.mean + torch.exp(0.5 * posterior.logvar) * batch.posterior_noise
        scale = config.latent_noise * latents.detach().std(dim=(0, 2, 3), keepdim=True)
        error = self.vae.decode(latents + scale * batch.latent_noise).float() - images
        terms = {
            "mse": error.square().mean(),
            "coarse_mse": F.avg_pool2d(error, 4).square().mean(),
            "edges": error.diff(dim=2).square().mean() + error.diff(dim=3).square().mean(),
            "l1": error.abs().mean(),
            "kl": posterior.kl().sum(),
        }
        loss = torch.stack([getattr(config, name) * value for name, value in terms.items()]).sum()
        noise = posterior.logvar.exp().mean(dim=(0, 2, 3)) / posterior.mean.var(dim=(0, 2, 3))
        return {"loss": loss, **terms, "worst_noise_share": noise.sqrt().max()}


class UNetLoss(nn.Module):
    """Mean squared error of the predicted noise (or velocity) in noisy latents, given the text.

    A ``text_encoder`` here is trained, or holds what is: adapters, or the embeddings of new words. ``grounding`` is the
    weight of the grounding loss in the sum, for batches that have masks; a sample counts in it as the square root of
    ᾱ, since in noise nothing is anywhere yet.
    """

    def __init__(
        self,
        unet: UNet,
        text_encoder: TextEncoder | None,
        schedule: NoiseSchedule,
        min_snr_gamma: float | None = None,
        grounding: float = 0.0,
    ):
        super().__init__()
        self.grounding = grounding
        self.unet = unet
        self.text_encoder = text_encoder
        self.schedule = schedule
        self.min_snr_gamma = min_snr_gamma

    def forward(self, batch: UNetBatch) -> dict[str, Float[Tensor, ""]]:
        """Compute the loss."""
        noisy_latents = self.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = self.schedule.target(batch.latents, batch.noise, batch.timesteps)
        texts = batch.texts if self.text_encoder is None else self.text_encoder(batch.texts)
        inputs = noisy_latents if batch.masked is None else torch.cat([noisy_latents, batch.masked], dim=1)
        grounded = self.grounding > 0 and batch.masks is not None and batch.tokens is not None
        if grounded:
            predicted, maps = self.unet.trace(inputs, batch.timesteps, texts, sites=is_grounded)
        else:
            predicted, maps = self.unet(inputs, batch.timesteps, texts), {}
        error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        if self.min_snr_gamma is not None:
            error = error * min_snr_weights(self.schedule, batch.timesteps, self.min_snr_gamma)
        if batch.weights is not None:
            error = error * batch.weights
        if not grounded:
            return {"loss": error.mean()}
        assert batch.masks is not None
        assert batch.tokens is not None
        signal = self.schedule.alphas_cumprod.to(error.device)[batch.timesteps].sqrt()
        placed = (signal * grounding_loss(maps, batch.masks, batch.tokens)).mean()
        return {"loss": error.mean() + self.grounding * placed, "denoising": error.mean(), "grounding": placed}


def min_snr_weights(schedule: NoiseSchedule, timesteps: Int[Tensor, " batch"], gamma: float) -> Float[Tensor, " batch"]:
    """Min-SNR-γ weights of a prediction's squared error (Hang et al. 2023, arXiv 2303.09556).

    The error of the denoised latents counts min(SNR, γ). That of ε is 1 / SNR of it, so ε counts min(SNR, γ) / SNR;
    that of v is 1 / (SNR + 1) of it, so v counts min(SNR, γ) / (SNR + 1), which is finite where the SNR is zero.
    """
    alphas = schedule.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas / (1 - alphas)
    divisor = snr if schedule.prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor
