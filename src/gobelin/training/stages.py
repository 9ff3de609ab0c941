"""The stages with gradients: text encoder, VAE, U-Net. Each holds its module, its data, and its loss."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Generator, Tensor, nn

from gobelin.clip import ImageEncoder, TextEncoder, contrastive_loss
from gobelin.data import Corpus
from gobelin.layers import Attention
from gobelin.pipeline import to_pil
from gobelin.schedule import NoiseSchedule
from gobelin.tokenizer import Tokenizer
from gobelin.training import distributed
from gobelin.training.config import TextStageConfig, UNetStageConfig, VAEStageConfig
from gobelin.unet import UNet
from gobelin.vae import VAE


class Sketcher(nn.Module):
    """A picture of 8×8 colours from words alone: each of its places attends to the words.

    It is what a U-Net has to do in pure noise, without a U-Net around it. It serves the text encoder's training only.
    """

    side = 8

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.places = nn.Parameter(torch.randn(self.side**2, width) / 2)
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads=heads)
        self.colours = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))

    def forward(self, text_embeddings: Tensor, mask: Tensor) -> Tensor:
        """Colours [B, 3, 8, 8] in [-1, 1], from text embeddings [B, L, D]; ``mask`` [B, L] is True where words are."""
        places = self.places.expand(len(text_embeddings), -1, -1)
        colours = self.colours(places + self.attention(self.norm(places), text_embeddings, mask))
        return rearrange(colours, "b (y x) c -> b c y x", y=self.side)

    def loss(self, text_embeddings: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        """The share of the colours' variance that the words leave unsaid, for images [B, 3, H, W] in [-1, 1]."""
        colours = F.interpolate(images, size=(self.side, self.side), mode="area")
        error = self(text_embeddings, mask).float() - colours
        return error.square().mean() / colours.var(dim=0).mean()


class TextModule(nn.Module):
    """The text encoder, and the two that it is trained with."""

    def __init__(self, text: TextEncoder, image: ImageEncoder):
        super().__init__()
        self.text = text
        self.image = image
        self.sketch = Sketcher(text.config.hidden_size, text.config.num_attention_heads)


class TextStage:
    """What captions mean, by CLIP's contrast of (image, caption) pairs, and where it goes, by sketches.

    The contrast has hard negatives where the data knows any.
    """

    name = "text_encoder"

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder,
        config: TextStageConfig,
    ):
        self.optim = config.optim
        self.rates = {"text.": config.text_rate}
        self.samples = len(corpus)
        self.module = TextModule(text_encoder, image_encoder)
        self._sketch = config.sketch
        self._corpus = corpus
        self._tokenizer = tokenizer
        captions, self._caption = corpus.distinct_captions()
        self._token_ids = tokenizer(captions)

    def loss(self, indices: Tensor, generator: Generator) -> dict[str, Tensor]:
        text_encoder, image_encoder = self.module.text, self.module.image
        captions = self._caption[indices]
        images = self._corpus.images(indices).to(text_encoder.device)
        token_ids = torch.cat([self._token_ids[captions], self._hard(indices, generator)]).to(images.device)
        words = token_ids != text_encoder.config.eos_token_id
        token_ids = token_ids[:, : int(words.sum(dim=1).max()) + 1]
        text_embeddings = text_encoder(token_ids)
        pooled = text_encoder.pooled(token_ids, text_embeddings)
        texts = image_encoder.project_text(pooled)
        logits = image_encoder.similarity(image_encoder(images), texts)
        same = (captions[:, None] == captions[None, :]).to(images.device)
        found = logits.argmax(dim=1)
        right = (found < len(indices)) & same.gather(1, found.clamp(max=len(indices) - 1)[:, None])[:, 0]
        contrast = contrastive_loss(logits, same)
        pairs = slice(len(indices))
        sketch = self.module.sketch.loss(text_embeddings[pairs], words[pairs, : token_ids.shape[1]], images)
        return {
            "loss": contrast + self._sketch * sketch,
            "contrast": contrast,
            "sketch": sketch,
            "accuracy": right.float().mean(),
        }

    def _hard(self, indices: Tensor, generator: Generator) -> Tensor:
        """The tokens of one wrong caption for each image that has any."""
        picks = torch.rand(len(indices), generator=generator).tolist()
        wrong = [(self._corpus.negatives[index], pick) for index, pick in zip(indices.tolist(), picks, strict=True)]
        return self._tokenizer([texts[int(pick * len(texts))] for texts, pick in wrong if texts])

    def picture(self, module: TextModule, step: int) -> None:
        return None


class VAEStage:
    """Reconstruction by squared errors that put colour first, and a KL term weighed so that no channel drowns."""

    name = "vae"

    def __init__(self, corpus: Corpus, vae: VAE, config: VAEStageConfig, shown: Tensor):
        self.optim = config.optim
        self.rates: dict[str, float] = {}
        self.samples = len(corpus)
        self.module = vae
        self._config = config
        self._corpus = corpus
        self._shown = shown
        _start_with_little_noise_(vae)

    def loss(self, indices: Tensor, generator: Generator) -> dict[str, Tensor]:
        config = self._config
        images = self._corpus.images(indices).to(self.module.device)
        posterior = self.module.encode(images)
        latents = posterior.sample(generator)
        spread = config.latent_noise * latents.detach().std(dim=(0, 2, 3), keepdim=True)
        latents = latents + spread * torch.randn(latents.shape, generator=generator).to(latents)
        error = self.module.decode(latents).float() - images
        parts = {
            "mse": error.square().mean(),
            "coarse_mse": F.avg_pool2d(error, 4).square().mean(),
            "edges": error.diff(dim=2).square().mean() + error.diff(dim=3).square().mean(),
            "l1": error.abs().mean(),
            "kl": posterior.kl().sum(),
        }
        loss = torch.stack([getattr(config, name) * value for name, value in parts.items()]).sum()
        noise = posterior.logvar.exp().mean(dim=(0, 2, 3)) / posterior.mean.var(dim=(0, 2, 3))
        return {"loss": loss, **parts, "worst_noise_share": noise.sqrt().max()}

    def picture(self, module: VAE, step: int) -> Image.Image:
        images = self._corpus.images(self._shown).to(module.device)
        both = torch.cat([images, module.decode(module.encode(images).mode())])
        return grid(to_pil(both), columns=len(images))


class Painter(nn.Module):
    """The U-Net, and the text encoder where the two are trained together."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder | None):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder


class UNetStage:
    """The noise (or velocity) in noisy latents, given the text: the seed of all the rest.

    ``latents`` and their posterior's ``spread`` are [N, 4, h, w]. ``texts`` holds every caption once, the empty one
    last: text embeddings [M, L, D], or token ids [M, L] where the text encoder is trained too. ``caption`` [N] says
    which is whose.
    """

    name = "unet"

    def __init__(
        self,
        module: Painter,
        schedule: NoiseSchedule,
        latents: Tensor,
        spread: Tensor,
        texts: Tensor,
        caption: Tensor,
        config: UNetStageConfig,
        picture: Callable[[Painter, int], Image.Image],
    ):
        self.optim = config.optim
        self.rates = {"text_encoder.": config.text_rate}
        self.samples = len(latents)
        self.module = module
        self._schedule = schedule
        self._latents, self._spread = latents, spread
        self._texts, self._caption = texts, caption
        self._config = config
        self._picture = picture

    def loss(self, indices: Tensor, generator: Generator) -> dict[str, Tensor]:
        unet, text_encoder = self.module.unet, self.module.text_encoder
        clean = self._latents[indices]
        latents = clean + self._spread[indices] * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = self._timesteps(len(indices), generator)
        dropped = torch.rand(len(indices), generator=generator) < self._config.caption_dropout
        caption = torch.where(dropped, len(self._texts) - 1, self._caption[indices])

        mine = distributed.part()
        latents, noise, timesteps = latents[mine], noise[mine], timesteps[mine]
        noisy_latents = self._schedule.add_noise(latents, noise, timesteps)
        target = self._schedule.target(latents, noise, timesteps).to(unet.device)
        texts = self._texts[caption[mine]].to(unet.device)
        text_embeddings = texts if text_encoder is None else text_encoder(texts)
        prediction = unet(noisy_latents.to(unet.device), timesteps.to(unet.device), text_embeddings)
        return {"loss": F.mse_loss(prediction.float(), target)}

    def _timesteps(self, count: int, generator: Generator) -> Tensor:
        """Spread evenly over the batch, then shifted towards noise (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
        last = self._schedule.config.num_train_timesteps
        even = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        shift = self._config.timestep_shift
        return (shift * even / (1 + (shift - 1) * even) * last).long().clamp(max=last - 1)

    def picture(self, module: Painter, step: int) -> Image.Image:
        return self._picture(module, step)


@torch.no_grad()
def encode_images(
    vae: VAE, corpus: Corpus, indices: Tensor, precision: str = "float32", batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of the raw posterior of these images, [N, 4, h, w] on the CPU."""
    means, spreads = [], []
    for batch in indices.split(batch_size):
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            posterior = vae.encode(corpus.images(batch).to(vae.device))
        means.append(posterior.mean.float().cpu())
        spreads.append((0.5 * posterior.logvar.float()).exp().cpu())
    return torch.cat(means), torch.cat(spreads)


@torch.no_grad()
def encode_texts(text_encoder: TextEncoder, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Text embeddings [N, L, D], on the encoder's device."""
    batches = tokenizer(texts).split(256)
    return torch.cat([text_encoder(token_ids.to(text_encoder.device)) for token_ids in batches])


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size as one picture, row by row, two pixels apart."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * (width + 2), index // columns * (height + 2)))
    return sheet


def _start_with_little_noise_(vae: VAE, logvar: float = -6.0) -> None:
    """Begin with a narrow posterior: a wide one drowns small details before the decoder has learned any."""
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[channels:].zero_()
        assert vae.quant_conv.bias is not None
        vae.quant_conv.bias[channels:].fill_(logvar)
