"""Training stages with gradients: text encoder, VAE, U-Net. Each holds its module, its data, and its loss."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Generator, Tensor, nn

from gobelin.clip import ImageEncoder, TextEncoder, contrastive_loss
from gobelin.data import CachedDataset, CaptionIndex
from gobelin.images import tensor_to_images
from gobelin.layers import Attention
from gobelin.schedule import NoiseSchedule
from gobelin.tokenizer import Tokenizer
from gobelin.training import distributed
from gobelin.training.config import TextStageConfig, UNetStageConfig, VAEStageConfig
from gobelin.training.precision import Precision, autocast
from gobelin.unet import UNet
from gobelin.vae import VAE

_LEAST_VARIANCE = 1e-4  # of colours in [-1, 1], about 1 of 255 levels: a batch of one image twice has none


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
        return error.square().mean() / colours.var(dim=0).mean().clamp(min=_LEAST_VARIANCE)


class TextModule(nn.Module):
    """The text encoder, with the image encoder and the sketch head that it is trained with."""

    def __init__(self, text: TextEncoder, image: ImageEncoder):
        super().__init__()
        self.text = text
        self.image = image
        self.sketch = SketchHead(text.config.hidden_size, text.config.num_attention_heads)


class TextStage:
    """Train the text encoder: CLIP's contrastive loss over (image, caption) pairs, and the sketch loss.

    Each image also gets one hard negative caption if the dataset has any for it.
    """

    name = "text_encoder"

    def __init__(
        self,
        dataset: CachedDataset,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder,
        config: TextStageConfig,
    ):
        self.optim = config.optim
        self.lr_ratios = {"text.": config.text_lr_ratio}
        self.dataset_size = len(dataset)
        self.module = TextModule(text_encoder, image_encoder)
        self._sketch = config.sketch
        self._dataset = dataset
        self._tokenizer = tokenizer
        captions, self._caption_index = dataset.unique_captions()
        self._token_ids = tokenizer(captions)

    def loss(self, indices: Int[Tensor, " batch"], generator: Generator) -> dict[str, Float[Tensor, ""]]:
        """Compute the loss, its two terms, and the accuracy of finding each image's caption in the batch."""
        text_encoder, image_encoder = self.module.text, self.module.image
        captions = self._caption_index.pick(indices, generator)
        images = self._dataset.images(indices).to(text_encoder.device)
        token_ids = torch.cat([self._token_ids[captions], self._hard_negatives(indices, generator)]).to(images.device)
        mask = token_ids != text_encoder.config.eos_token_id
        token_ids = token_ids[:, : int(mask.sum(dim=1).max()) + 1]
        text_embeddings = text_encoder(token_ids)
        pooled = text_encoder.pooled(token_ids, text_embeddings)
        texts = image_encoder.project_text(pooled)
        logits = image_encoder.similarity(image_encoder(images), texts)
        same = (captions[:, None] == captions[None, :]).to(images.device)
        found = logits.argmax(dim=1)
        right = (found < len(indices)) & same.gather(1, found.clamp(max=len(indices) - 1)[:, None])[:, 0]
        contrast = contrastive_loss(logits, same)
        pairs = slice(len(indices))  # without the hard negatives
        sketch = self.module.sketch.loss(text_embeddings[pairs], mask[pairs, : token_ids.shape[1]], images)
        return {
            "loss": contrast + self._sketch * sketch,
            "contrast": contrast,
            "sketch": sketch,
            "accuracy": right.float().mean(),
        }

    def _hard_negatives(self, indices: Tensor, generator: Generator) -> Tensor:
        """Draw one hard negative for each image that has any; token ids [up to batch, length]."""
        picks = torch.rand(len(indices), generator=generator).tolist()
        negatives = [
            (self._dataset.negatives[index], pick) for index, pick in zip(indices.tolist(), picks, strict=True)
        ]
        return self._tokenizer([texts[int(pick * len(texts))] for texts, pick in negatives if texts])

    def sample_grid(self, module: TextModule, step: int) -> None:
        """Draw nothing: a text encoder has no images to show."""
        return None


class VAEStage:
    """Train the VAE: squared errors that weigh colour most, and a KL term small enough to keep every latent channel.

    The weights are those of "The VAE's loss, and its noise" in docs/decisions.md. ``shown`` are the indices of the
    images in the sample grid.
    """

    name = "vae"

    def __init__(self, dataset: CachedDataset, vae: VAE, config: VAEStageConfig, shown: Int[Tensor, " shown"]):
        self.optim = config.optim
        self.lr_ratios: dict[str, float] = {}
        self.dataset_size = len(dataset)
        self.module = vae
        self._config = config
        self._dataset = dataset
        self._shown = shown
        _init_posterior_(vae)

    def loss(self, indices: Int[Tensor, " batch"], generator: Generator) -> dict[str, Float[Tensor, ""]]:
        """Compute the loss, its terms, and the posterior's largest noise-to-signal ratio among the latent channels."""
        config = self._config
        images = self._dataset.images(indices).to(self.module.device)
        posterior = self.module.encode(images)
        latents = posterior.sample(generator)
        scale = config.latent_noise * latents.detach().std(dim=(0, 2, 3), keepdim=True)
        latents = latents + scale * torch.randn(latents.shape, generator=generator).to(latents)
        error = self.module.decode(latents).float() - images
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

    def sample_grid(self, module: VAE, step: int) -> Image.Image:
        """Draw the shown images above their reconstructions."""
        images = self._dataset.images(self._shown).to(module.device)
        both = torch.cat([images, module.decode(module.encode(images).mode())])
        return image_grid(tensor_to_images(both), columns=len(images))


class TrainedModules(nn.Module):
    """The U-Net, and the text encoder if the two are trained together."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder | None):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder


class UNetStage:
    """Train the U-Net: predict the noise (or velocity) in noisy latents, given the text.

    ``latents`` and ``stds`` are the posterior's mean and standard deviation, scaled. ``texts`` holds every caption
    once, the empty one last: text embeddings, or token ids if the text encoder is trained too. ``caption_index``
    has each image's rows in it. ``sample`` draws the sample grid.
    """

    name = "unet"

    def __init__(
        self,
        module: TrainedModules,
        schedule: NoiseSchedule,
        latents: Float[Tensor, "images channels h w"],
        stds: Float[Tensor, "images channels h w"],
        texts: Float[Tensor, "captions length dim"] | Int[Tensor, "captions length"],
        caption_index: CaptionIndex,
        config: UNetStageConfig,
        sample: Callable[[TrainedModules, int], Image.Image],
    ):
        self.optim = config.optim
        self.lr_ratios = {"text_encoder.": config.text_lr_ratio}
        self.dataset_size = len(latents)
        self.module = module
        self._schedule = schedule
        self._latents, self._stds = latents, stds
        self._texts, self._caption_index = texts, caption_index
        self._config = config
        self._sample = sample

    def loss(self, indices: Int[Tensor, " batch"], generator: Generator) -> dict[str, Float[Tensor, ""]]:
        """Compute the mean squared error of the prediction, over this process's shard of the batch."""
        unet, text_encoder = self.module.unet, self.module.text_encoder
        means = self._latents[indices]
        latents = means + self._stds[indices] * torch.randn(means.shape, generator=generator)
        noise = torch.randn(means.shape, generator=generator)
        timesteps = self._timesteps(len(indices), generator)
        dropped = torch.rand(len(indices), generator=generator) < self._config.caption_dropout
        captions = torch.where(dropped, len(self._texts) - 1, self._caption_index.pick(indices, generator))

        rows = distributed.shard()
        latents, noise, timesteps = latents[rows], noise[rows], timesteps[rows]
        noisy_latents = self._schedule.add_noise(latents, noise, timesteps)
        target = self._schedule.target(latents, noise, timesteps).to(unet.device)
        texts = self._texts[captions[rows]].to(unet.device)
        text_embeddings = texts if text_encoder is None else text_encoder(texts)
        prediction = unet(noisy_latents.to(unet.device), timesteps.to(unet.device), text_embeddings)
        return {"loss": F.mse_loss(prediction.float(), target)}

    def _timesteps(self, count: int, generator: Generator) -> Tensor:
        """Sample timesteps, stratified over the batch and shifted towards noise.

        Esser et al. 2024, arXiv 2403.03206, eq. 23; measured in "Timesteps shifted towards noise", docs/decisions.md.
        """
        last = self._schedule.config.num_train_timesteps
        even = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        shift = self._config.timestep_shift
        return (shift * even / (1 + (shift - 1) * even) * last).long().clamp(max=last - 1)

    def sample_grid(self, module: TrainedModules, step: int) -> Image.Image:
        """Draw images for the first captions of the dataset."""
        return self._sample(module, step)


@torch.no_grad()
def encode_images(
    vae: VAE,
    dataset: CachedDataset,
    indices: Int[Tensor, " images"],
    precision: Precision = "float32",
    batch_size: int = 64,
) -> tuple[Float[Tensor, "images channels h w"], Float[Tensor, "images channels h w"]]:
    """Encode images to the mean and standard deviation of the VAE's posterior, unscaled, on the CPU."""
    means, stds = [], []
    for batch in indices.split(batch_size):
        with autocast(vae.device, precision):
            posterior = vae.encode(dataset.images(batch).to(vae.device))
        means.append(posterior.mean.float().cpu())
        stds.append((0.5 * posterior.logvar.float()).exp().cpu())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def encode_texts(
    text_encoder: TextEncoder, tokenizer: Tokenizer, texts: list[str]
) -> Float[Tensor, "texts length dim"]:
    """Encode texts to text embeddings, on the encoder's device."""
    batches = tokenizer(texts).split(256)
    return torch.cat([text_encoder(token_ids.to(text_encoder.device)) for token_ids in batches])


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange images of one size in a grid, row by row, two pixels apart on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * (width + 2), index // columns * (height + 2)))
    return grid


def _init_posterior_(vae: VAE, logvar: float = -6.0) -> None:
    """Start with a narrow posterior: a wide one drowns small details before the decoder has learned any.

    The value is that of "The VAE's loss, and its noise" in docs/decisions.md.
    """
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[channels:].zero_()
        assert vae.quant_conv.bias is not None
        vae.quant_conv.bias[channels:].fill_(logvar)
