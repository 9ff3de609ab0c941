"""Attention maps of any image with a caption, whoever made it: noised, and predicted once at each of some timesteps.

What a U-Net attends to while it denoises an image does not depend on who painted it. The image is encoded, noise is
added as training adds it (Ho et al. 2020, equation 4), and a pass with the caption says which words each patch hears.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval, Len
from PIL import Image
from torch import Generator, Tensor

from gobelin.attention import Trace
from gobelin.checkpoint import Model
from gobelin.engines import Engine
from gobelin.errors import UsageError
from gobelin.guidance import ConditionedUNet, Predictions
from gobelin.images import ImageSource, images_to_tensor, open_image, tensor_to_images
from gobelin.look.heatmaps import Collector, HeatMaps
from gobelin.plan import check_clip_skip, chunk_prompts, find_trace, inpaints, latent_size
from gobelin.prompt_weighting import PromptSyntax
from gobelin.settings import Prompts, Seed
from gobelin.text_conditioning import Chunks, TextConditioning, batch_texts, encode_chunks
from gobelin.types import Images, Latents
from gobelin.validation import shown, validated

LOOK_TIMESTEPS = (100, 300, 500)
"""From the last step of painting, where little is undecided, to the middle, where words still say what comes."""
_Side = Annotated[int, Ge(1)] | None
_Count = Annotated[int, Ge(0)] | None
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


def look_at_images(
    model: Model,
    engine: Engine,
    images: ImageSource | Sequence[ImageSource],
    captions: Prompts,
    *,
    timesteps: Sequence[int],
    trace: Literal["sharp", True] | Trace,
    seed: int,
    size: tuple[int | None, int | None],
    syntax: PromptSyntax | None,
    clip_skip: int | None,
) -> list[HeatMaps]:
    """Do as :meth:`gobelin.pipeline.Pipeline.look`; images of one size are traced together."""
    sources = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    opened = [open_image(image) for image in sources]
    if not opened:
        raise UsageError("there is no image to look at: give one, or several")
    last = model.schedule.config.num_train_timesteps - 1
    whole = Annotated[int, Interval(ge=0, le=last)]
    for name, value, kind in (
        ("timesteps", timesteps, Annotated[Sequence[whole], Len(1), f"whole numbers from 0 to {last}"]),
        ("the seed", seed, Seed),
        ("weights", syntax, PromptSyntax | None),
        ("clip_skip", clip_skip, _Count),
        ("height", size[0], _Side),
        ("width", size[1], _Side),
    ):
        validated(name, value, kind)
    syntax = syntax or model.recommended.weights or "a1111"
    skipped = check_clip_skip(model, (model.recommended.clip_skip or 0) if clip_skip is None else clip_skip)
    texts = caption_list(captions, len(opened))
    distinct = chunk_prompts(model, texts, syntax, stacklevel=4)
    chunks = [distinct[text] for text in texts]
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(opened):
        by_size.setdefault(latent_size(model, *fitted_size(model, image.size, *size)), []).append(index)
    looked: dict[int, HeatMaps] = {}
    for one_size, indices in by_size.items():
        found = find_trace(model.unet.attention_sites, trace, one_size)
        if found is None:
            raise UsageError('trace is False, and maps are all that there is to see: give True, "sharp" or a Trace')
        tracer = ImageTracer(
            model=model,
            engine=engine,
            trace=replace(found, start=0.0),  # the timesteps say where
            timesteps=timesteps,
            seed=seed,
            syntax=syntax,
            clip_skip=skipped,
        )
        traced = tracer.heatmaps([opened[index] for index in indices], [chunks[index] for index in indices], one_size)
        looked |= zip(indices, traced, strict=True)
    ordered = [looked[index] for index in range(len(opened))]
    return [heatmaps.sharpened() for heatmaps in ordered] if trace == "sharp" else ordered


@dataclass(frozen=True, kw_only=True)
class ImageTracer:
    """Trace attention to captions in images of one size: at ``timesteps``, under noise that ``seed`` draws.

    Every image has noise of its own generator, so that its maps do not depend on its neighbours.
    """

    model: Model
    engine: Engine
    trace: Trace
    timesteps: Sequence[int]
    seed: int
    syntax: PromptSyntax
    clip_skip: int

    def heatmaps(
        self, images: Sequence[Image.Image], captions: Sequence[Chunks], latent_size: tuple[int, int]
    ) -> Iterator[HeatMaps]:
        """Trace images, resized to the latents' size, each with its caption; yields heat maps in their order."""
        factor = self.model.vae.config.factor
        height, width = (side * factor for side in latent_size)
        at_once = max(1, MAX_TRACED_PIXELS // (height * width))
        for start in range(0, len(images), at_once):
            part = slice(start, start + at_once)
            resized = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images[part]]
            yield from self._traced(images_to_tensor(resized), captions[part])

    @torch.no_grad()
    def _traced(self, images: Images, captions: Sequence[Chunks]) -> list[HeatMaps]:
        latents, text = self._encode_images(images), self._encode_texts(captions)
        network = ConditionedUNet(
            unet=self.engine.unet,
            schedule=self.model.schedule,
            positive=text,
            negative=text,
            trace=self.trace,
            extra_channels=self._extra_channels(images),
        )
        generators = [Generator().manual_seed(self.seed) for _ in captions]
        collector = Collector(self.trace)
        for timestep in self.timesteps:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=each) for each in generators])
            noisy_latents = self.model.schedule.add_noise(
                latents, noise.to(latents.device), torch.full((len(captions),), timestep)
            )
            predictions = Predictions(
                network=network,
                noisy_latents=noisy_latents,
                timestep=timestep,
                alpha_cumprod=self.model.schedule.alphas_cumprod[timestep].item(),
            )
            predictions.positive()
            collector.add(predictions.maps)
        length = text.embeddings.shape[1]
        return [
            HeatMaps(
                words=caption.words.at_length(length),
                maps=collector.maps(index),
                latent_size=(latents.shape[2], latents.shape[3]),
                image=image,
            )
            for index, (caption, image) in enumerate(zip(captions, tensor_to_images(images), strict=True))
        ]

    def _encode_images(self, images: Images) -> Latents:
        """Encode images to the means of their posteriors."""
        vae = self.model.vae
        return vae.images_to_latents(images.to(vae.device, vae.dtype)).float()

    def _encode_texts(self, captions: Sequence[Chunks]) -> TextConditioning:
        model = self.model
        return batch_texts(
            [
                encode_chunks(model.text_encoder, model.tokenizer, caption, self.syntax, self.clip_skip).to(
                    model.unet.dtype
                )
                for caption in captions
            ]
        )

    def _extra_channels(self, images: Images) -> Tensor | None:
        """Make what a U-Net that inpaints sees: a mask of the whole image, and nothing around it."""
        if not inpaints(self.model.unet):
            return None
        masked = self._encode_images(torch.zeros_like(images))
        return torch.cat([torch.ones_like(masked[:, :1]), masked], dim=1)
