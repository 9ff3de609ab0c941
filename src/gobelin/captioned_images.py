"""Attention maps and features of any image, whoever made it: noised, and predicted at chosen timesteps.

What a U-Net attends to while it denoises an image does not depend on who painted it. The image is encoded, noise is
added as training adds it (Ho et al. 2020, equation 4), and a pass with a caption says which words each patch hears, and
what the U-Net's layers make of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from annotated_types import Ge, Interval, Len
from jaxtyping import Float
from PIL import Image
from torch import Generator, Tensor

from gobelin.attention import Trace, choose_layers, choose_sites
from gobelin.checkpoint import Model
from gobelin.engines import Engine, NoisePredictor
from gobelin.errors import UsageError
from gobelin.guidance import ConditionedUNet, Predictions
from gobelin.images import ImageSource, images_to_tensor, open_image, tensor_to_images
from gobelin.look.collector import Collector
from gobelin.look.heatmaps import HeatMaps
from gobelin.look.patch_features import PatchFeatures, join_layers
from gobelin.look.sharp_maps import sharp_trace
from gobelin.plan import check_clip_skip, chunk_prompts, chunk_words, find_trace, inpaints, latent_size
from gobelin.prompt_weighting import PromptSyntax
from gobelin.settings import Prompts, Seed
from gobelin.text_conditioning import (
    Chunks,
    TextConditioning,
    batch_texts,
    beside_words,
    encode_chunks,
    encode_words,
)
from gobelin.types import Images, Latents
from gobelin.unet import UNet
from gobelin.validation import Count, shown, validated

LOOK_TIMESTEPS = (20,)
"""Nearly no noise: maps point best there, and more timesteps add nothing (docs/decisions.md, *Where to look*)."""
FEATURE_TIMESTEP, FEATURE_NOISES = 261, 8
"""Tang et al. 2023 (arXiv 2306.03881) chose these for Stable Diffusion; on scenes other timesteps are no better."""
PRESENCE_TIMESTEPS, PRESENCE_NOISES = (300, 500, 700), 2
_Side = Annotated[int, Ge(1)] | None
_Skip = Annotated[int, Ge(0)] | None
MAX_TRACED_PIXELS = 2**20  # at once: four images of 512×512 pixels


def fitted_size(
    model: Model, image_size: tuple[int, int], height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Fit an image, (width, height), to a model: height and width of about as many pixels as the model's own.

    A side that is given stays, and the other is what keeps the image's proportions.
    """
    factor = model.vae.config.factor
    own = model.unet.config.sample_size * factor
    wide, high = image_size
    scale = own / math.sqrt(wide * high)
    if height is not None:
        scale = height / high
    elif width is not None:
        scale = width / wide

    def fit(side: int, given: int | None) -> int:
        return max(1, round(side * scale / factor)) * factor if given is None else given

    return fit(high, height), fit(wide, width)


def caption_list(captions: Prompts, count: int) -> list[str]:
    """List the captions of so many images: one for all of them, or one of each.

    Raises :class:`UsageError` for another number of them, and for one that says nothing.
    """
    texts = [captions] * count if isinstance(captions, str) else captions
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"the captions are {shown(captions)}: give text, or a list of texts")
    if len(texts) != count:
        raise UsageError(f"{len(texts)} captions given for {count} images: give one for all, or one of each")
    if not all(text.strip() for text in texts):
        raise UsageError("the caption is empty: say in a few words what is to be seen in the image")
    return list(texts)


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """Options of looking at images: the noise's seed, height and width to look at, and how captions are read."""

    seed: int
    size: tuple[int | None, int | None]
    syntax: PromptSyntax
    clip_skip: int

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        seed: int,
        size: tuple[int | None, int | None],
        weights: PromptSyntax | None,
        clip_skip: int | None,
    ) -> Self:
        """Check options that people gave, and fill in what the model recommends; raises :class:`UsageError`."""
        for name, value, kind in (
            ("the seed", seed, Seed),
            ("weights", weights, PromptSyntax | None),
            ("clip_skip", clip_skip, _Skip),
            ("height", size[0], _Side),
            ("width", size[1], _Side),
        ):
            validated(name, value, kind)
        skipped = (model.recommended.clip_skip or 0) if clip_skip is None else clip_skip
        syntax = weights or model.recommended.weights or "a1111"
        return cls(seed=seed, size=size, syntax=syntax, clip_skip=check_clip_skip(model, skipped))

    def latent_size(self, model: Model, image: Image.Image) -> tuple[int, int]:
        """Choose height and width of an image's latents."""
        return latent_size(model, *fitted_size(model, image.size, *self.size))


def look_at_images(
    model: Model,
    engine: Engine,
    images: ImageSource | Sequence[ImageSource],
    captions: Prompts,
    *,
    timesteps: Sequence[int],
    trace: Literal["sharp", True] | Trace,
    also: Sequence[str],
    options: LookOptions,
    advance: Callable[[int], None],
) -> list[HeatMaps]:
    """Do as :meth:`gobelin.pipeline.Pipeline.look`; images of one size are traced together."""
    opened = _open_images(images)
    _check_timesteps(model, timesteps)
    texts = caption_list(captions, len(opened))
    distinct = chunk_prompts(model, texts, options.syntax, stacklevel=4)
    beside = Trace(also=also).also
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(opened):
        by_size.setdefault(options.latent_size(model, image), []).append(index)
    looked: dict[int, HeatMaps] = {}
    for size, indices in by_size.items():
        found = find_trace(model.unet.attention_sites, trace, size, model.head_weights)
        if found is None:
            raise UsageError('trace is False, and maps are all that there is to see: give True, "sharp" or a Trace')
        if found.negative:
            raise UsageError("an image that is looked at has no negative prompt: look for its words by also=")
        found = replace(found, start=0.0, also=(*found.also, *beside))  # the timesteps say where
        tracer = ImageTracer(
            model=model,
            engine=engine,
            trace=found,
            also=chunk_words(model, found.also, options.syntax, stacklevel=4),
            timesteps=timesteps,
            options=options,
            advance=advance,
        )
        chunks = [distinct[texts[index]] for index in indices]
        looked |= zip(indices, tracer.heatmaps([opened[index] for index in indices], chunks, size), strict=True)
    return [looked[index] for index in range(len(opened))]


def features_of_images(
    model: Model,
    images: ImageSource | Sequence[ImageSource],
    captions: Prompts,
    *,
    timestep: int,
    layers: str | Sequence[str] | None,
    noises: int,
    options: LookOptions,
) -> PatchFeatures:
    """Do as :meth:`gobelin.pipeline.Pipeline.features`."""
    opened = _open_images(images)
    last = model.schedule.config.num_train_timesteps - 1
    validated("timestep", timestep, Annotated[int, Interval(ge=0, le=last)])
    validated("noises", noises, Count)
    texts = [""] * len(opened) if captions == "" else caption_list(captions, len(opened))
    distinct = chunk_prompts(model, texts, options.syntax, stacklevel=4)
    size, *others = {options.latent_size(model, image): None for image in opened}
    if others:
        raise UsageError("the images are of several shapes, and features of one: give the height and width for all")
    chosen = choose_layers(model.unet.layer_names, feature_layer(model.unet, size) if layers is None else layers)
    resized, values = [], []
    for part in _parts(model, len(opened), size):
        pixels = _resized(model, opened[part], size)
        text = _encode_captions(model, [distinct[caption] for caption in texts[part]], options)
        values.append(_mean_features(NoisedImages(model, pixels, options.seed), text, timestep, chosen, noises))
        resized += tensor_to_images(pixels)
    return PatchFeatures(values=torch.cat(values), images=resized, layers=chosen)


@torch.no_grad()
def presence_in_images(
    model: Model,
    engine: Engine,
    images: ImageSource | Sequence[ImageSource],
    texts: Sequence[str],
    *,
    timesteps: Sequence[int],
    noises: int,
    options: LookOptions,
) -> list[dict[str, float]]:
    """Do as :meth:`gobelin.pipeline.Pipeline.presence`."""
    opened = _open_images(images)
    _check_timesteps(model, timesteps)
    validated("noises", noises, Count)
    listed = list(dict.fromkeys(validated("texts", texts, Annotated[Sequence[str], "texts, as in ['a dog', 'a cat']"])))
    if not listed or not all(text.strip() for text in listed):
        raise UsageError("a text is empty, or there is none: say in a few words what might be in the image")
    chunks = chunk_prompts(model, ["", *listed], options.syntax, stacklevel=4)
    text = _encode_captions(model, list(chunks.values()), options)
    gains: list[dict[str, float]] = []
    for image in opened:
        size = options.latent_size(model, image)
        noised = NoisedImages(model, _resized(model, [image], size), options.seed)
        errors = torch.zeros(len(timesteps), len(chunks))
        for step, timestep in enumerate(timesteps):
            for _ in range(noises):
                errors[step] += noised.errors(engine.unet, text, timestep).cpu()
        share = 1 - errors[:, 1:] / errors[:, :1]
        gains.append(dict(zip(listed, share.mean(dim=0).tolist(), strict=True)))
    return gains


def feature_layer(unet: UNet, latent_size: tuple[int, int]) -> str:
    """Choose the layer whose features correspond best: the first of the decoder's level that sharp maps are made of.

    Measured on scenes (docs/attribution.md, *Patches that correspond*); with Stable Diffusion at 512 pixels it is the
    layer after the one that Tang et al. 2023 chose.
    """
    first, *_ = choose_sites(unet.attention_sites, sharp_trace(unet.attention_sites, latent_size).sites)
    return next(name for name in unet.layer_names if first.name.startswith(f"{name}."))


@dataclass(frozen=True, kw_only=True)
class ImageTracer:
    """Trace attention to captions in images of one size: at ``timesteps``, under noise.

    Every image has noise of its own generator, so that its maps do not depend on its neighbours. ``also`` are the words
    that are looked for beside the captions; ``advance`` is called with each timestep of each batch when it is done.
    """

    model: Model
    engine: Engine
    trace: Trace
    also: Sequence[Chunks]
    timesteps: Sequence[int]
    options: LookOptions
    advance: Callable[[int], None]

    def heatmaps(
        self, images: Sequence[Image.Image], captions: Sequence[Chunks], latent_size: tuple[int, int]
    ) -> Iterator[HeatMaps]:
        """Trace images, resized to the latents' size, each with its caption; yields heat maps in their order."""
        for part in _parts(self.model, len(images), latent_size):
            yield from self._traced(_resized(self.model, images[part], latent_size), captions[part])

    @torch.no_grad()
    def _traced(self, images: Images, captions: Sequence[Chunks]) -> list[HeatMaps]:
        model, options = self.model, self.options
        noised = NoisedImages(model, images, options.seed)
        text = _encode_captions(model, captions, options)
        also = encode_words(
            *(model.text_encoder, model.tokenizer, self.also, options.syntax, options.clip_skip, model.unet.dtype)
        )
        network = replace(noised.network(self.engine.unet, text), trace=self.trace, also=also)
        collector = Collector(self.trace)
        for timestep in self.timesteps:
            predictions = Predictions(
                network=network,
                noisy_latents=noised.at(timestep),
                timestep=timestep,
                alpha_cumprod=model.schedule.alphas_cumprod[timestep].item(),
            )
            predictions.positive()
            collector.add(predictions.maps)
            self.advance(timestep)
        length, size = text.embeddings.shape[1], (noised.latents.shape[2], noised.latents.shape[3])
        return [
            collector.heatmaps(index, caption.words.at_length(length), image, size, also=beside_words(self.also))
            for index, (caption, image) in enumerate(zip(captions, tensor_to_images(images), strict=True))
        ]


class NoisedImages:
    """Images' latents under noise, which a generator of its own draws for each, from one seed."""

    @torch.no_grad()
    def __init__(self, model: Model, images: Images, seed: int):
        self.model = model
        self.latents = _encode_images(model, images)
        self._generators = [Generator().manual_seed(seed) for _ in images]
        self._extra_channels = _extra_channels(model, images)

    def at(self, timestep: int) -> Latents:
        """Add the next noise to the latents, as much as there is at a timestep."""
        return self._noised(timestep)[0]

    def _noised(self, timestep: int) -> tuple[Latents, Latents]:
        """Draw the next noise; return the noisy latents and the noise."""
        drawn = [torch.randn(self.latents.shape[1:], generator=each) for each in self._generators]
        noise = torch.stack(drawn).to(self.latents.device)
        timesteps = torch.full((len(self.latents),), timestep)
        return self.model.schedule.add_noise(self.latents, noise, timesteps), noise

    def errors(self, unet: NoisePredictor, text: TextConditioning, timestep: int) -> Float[Tensor, " texts"]:
        """Compute the mean squared error of the noise that each text predicts in one image, under the next noise."""
        noisy_latents, noise = self._noised(timestep)
        schedule, count = self.model.schedule, len(text.embeddings)
        timesteps = torch.full((1,), timestep, dtype=torch.float32, device=noisy_latents.device)
        inputs = self.network(unet, text).inputs(noisy_latents)
        prediction = unet(inputs, timesteps, text.embeddings, text.mask).float()
        alpha = schedule.alphas_cumprod[timestep].item()
        _, found = schedule.split(prediction, noisy_latents.expand(count, -1, -1, -1), alpha)
        return (found - noise).square().mean(dim=(1, 2, 3))

    def network(self, unet: NoisePredictor, text: TextConditioning) -> ConditionedUNet:
        """Condition a U-Net on a text for each image."""
        return ConditionedUNet(
            unet=unet,
            schedule=self.model.schedule,
            positive=text,
            negative=text,
            extra_channels=self._extra_channels,
        )


@torch.no_grad()
def _mean_features(
    noised: NoisedImages, text: TextConditioning, timestep: int, layers: Sequence[str], noises: int
) -> Tensor:
    """Average the layers' features over several noises, and join them: [B, C, rows, columns]."""
    unet = noised.model.unet
    network = noised.network(unet, text)
    timesteps = torch.full((len(noised.latents),), timestep, dtype=torch.float32, device=unet.device)
    sums: dict[str, Tensor] = {}
    for _ in range(noises):
        inputs = network.inputs(noised.at(timestep))
        for name, found in unet.features(inputs, timesteps, text.embeddings, text.mask, layers).items():
            sums[name] = sums[name] + found.float() if name in sums else found.float()
    return join_layers([sums[name] / noises for name in layers])


def _open_images(images: ImageSource | Sequence[ImageSource]) -> list[Image.Image]:
    sources = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    if not sources:
        raise UsageError("there is no image to look at: give one, or several")
    return [open_image(image) for image in sources]


def _check_timesteps(model: Model, timesteps: Sequence[int]) -> None:
    last = model.schedule.config.num_train_timesteps - 1
    whole = Annotated[int, Interval(ge=0, le=last)]
    validated("timesteps", timesteps, Annotated[Sequence[whole], Len(1), f"whole numbers from 0 to {last}"])


def _parts(model: Model, count: int, size: tuple[int, int]) -> Iterator[slice]:
    """Split so many images, whose latents are of a size, into as many at a time as memory is meant for."""
    at_once = max(1, MAX_TRACED_PIXELS // (size[0] * size[1] * model.vae.config.factor**2))
    return (slice(start, start + at_once) for start in range(0, count, at_once))


def _resized(model: Model, images: Sequence[Image.Image], size: tuple[int, int]) -> Images:
    """Resize images to those of latents of a size."""
    height, width = (side * model.vae.config.factor for side in size)
    return images_to_tensor([image.resize((width, height), Image.Resampling.LANCZOS) for image in images])


def _encode_images(model: Model, images: Images) -> Latents:
    """Encode images to the means of their posteriors."""
    vae = model.vae
    return vae.images_to_latents(images.to(vae.device, vae.dtype)).float()


def _encode_captions(model: Model, captions: Sequence[Chunks], options: LookOptions) -> TextConditioning:
    return batch_texts(
        [
            encode_chunks(model.text_encoder, model.tokenizer, caption, options.syntax, options.clip_skip).to(
                model.unet.dtype
            )
            for caption in captions
        ]
    )


def _extra_channels(model: Model, images: Images) -> Tensor | None:
    """Make what a U-Net that inpaints sees: a mask of the whole image, and nothing around it."""
    if not inpaints(model.unet):
        return None
    masked = _encode_images(model, torch.zeros_like(images))
    return torch.cat([torch.ones_like(masked[:, :1]), masked], dim=1)
