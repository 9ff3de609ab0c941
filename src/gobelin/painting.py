"""Painting: a plan becomes steps, and steps become images; :meth:`Painting._sample` is a prompt's whole way."""

import html
import re
import unicodedata
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gobelin.attention import ExtraWords, Trace
from gobelin.checkpoint import Model
from gobelin.denoiser import ComposableDenoiser, Denoiser
from gobelin.engines import Engine, LatentDecoder
from gobelin.errors import Cancelled, ModelError, UsageError
from gobelin.formats.png import write_png
from gobelin.guidance import ConditionedUNet
from gobelin.images import data_url, png_bytes, tensor_to_images
from gobelin.inpainting import Inpainting, noised_image, source_images
from gobelin.look.collector import Collector
from gobelin.look.heatmaps import HeatMaps
from gobelin.look.page import word_map_element
from gobelin.plan import Plan, inpaints
from gobelin.samplers import NoiseSource, Step, sample_latents
from gobelin.shortcuts import ShortcutPlan
from gobelin.text_conditioning import TextConditioning, batch_texts, beside_words, encode_chunks, encode_words
from gobelin.types import Images, Latents, Mask

MAX_DECODED_PIXELS = 2**22  # at once: the VAE of Stable Diffusion takes some 7 GB for them
MIN_SHOWN = 256  # pixels: smaller images are enlarged where a notebook shows them
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_NAME_LENGTH = 60  # characters of a prompt in a file name


@dataclass(frozen=True, kw_only=True)
class PaintingStep(Step):
    """A sampler's step that can show the image as it is predicted so far."""

    vae: LatentDecoder

    @torch.no_grad()
    def preview(self, index: int = 0) -> Image.Image:
        """Decode image ``index`` of the batch as it is predicted at this step."""
        return tensor_to_images(self.vae.latents_to_images(self.denoised[index : index + 1].to(self.vae.dtype)))[0]

    def __repr__(self) -> str:
        return f"PaintingStep(index={self.index}, timestep={self.timestep:g}, latents={list(self.latents.shape)})"

    def _repr_png_(self) -> bytes:
        return png_bytes(self.preview())


@dataclass(frozen=True, kw_only=True)
class Result:
    """Painted images, with their latents [B, 4, h, w] and, for each, the settings that repeat it.

    Where they were traced, ``heatmaps`` say for each which word painted what.
    """

    images: list[Image.Image]
    latents: Latents
    settings: list[dict[str, Any]]
    traced: list[HeatMaps] | None = None

    @property
    def heatmaps(self) -> list[HeatMaps]:
        """The heat maps of each image; raises :class:`UsageError` where they were not traced."""
        if self.traced is None:
            raise UsageError("these images were painted without a trace: paint with trace=True")
        return self.traced

    def __repr__(self) -> str:
        width, height = self.images[0].size
        prompts = ", ".join(dict.fromkeys(repr(settings["prompt"]) for settings in self.settings))
        seeds = ", ".join(str(settings["seed"]) for settings in self.settings[:4])
        more = ", …" if len(self.settings) > 4 else ""
        traced = "" if self.traced is None else ", with heat maps"
        return f"Result({len(self.images)} of {width}×{height}: {prompts[:200]}; seed {seeds}{more}{traced})"

    def _repr_html_(self) -> str:
        if self.traced is not None:
            return "".join(word_map_element(heatmaps) for heatmaps in self.traced)
        pairs = zip(self.images, self.settings, strict=True)
        return "".join(
            f'<img src="{data_url(image)}" alt="{html.escape(made["prompt"])}" width="{max(MIN_SHOWN, image.width)}">'
            for image, made in pairs
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write PNGs that carry their settings, never over an existing file; returns their paths.

        Raises :class:`UsageError` for the name of a file in place of a folder's.
        """
        if Path(folder).is_file() or Path(folder).suffix.lower() in _IMAGE_SUFFIXES:
            raise UsageError(f"{folder} is the name of a file: give a folder, in which prompt and seed make the names")
        paths = []
        for image, settings in zip(self.images, self.settings, strict=True):
            path = _free_path(Path(folder), file_stem(settings))
            write_png(path, image, settings)
            paths.append(path)
        return paths


@dataclass(frozen=True, kw_only=True)
class _Start:
    """The start of sampling: noise, an image's latents, and the mask of what is painted anew in it."""

    noise: Latents
    clean: Latents | None = None
    mask: Mask | None = None
    extra_channels: Float[Tensor, "batch more h w"] | None = None


@dataclass(kw_only=True)
class Painting:
    """Images while they are painted: iterate over the steps, or take the :attr:`result`, which runs what is left.

    ``settings`` are known before the first step, and ``len()`` is the number of steps. :meth:`cancel` ends it after the
    step that is running, from any thread.
    """

    model: Model
    plan: Plan = field(repr=False)
    engine: Engine = field(repr=False)
    _steps: Iterator[PaintingStep] = field(init=False, repr=False)
    _collector: Collector = field(init=False, repr=False)
    _latents: Tensor | None = field(default=None, init=False, repr=False)
    _done: int = field(default=0, init=False, repr=False)
    _result: Result | None = field(default=None, init=False, repr=False)
    _cancelled: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self._steps = self._sample()
        self._collector = Collector(self.plan.trace or Trace(), images=len(self.plan))

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The settings of each image, enough to repeat it."""
        return self.plan.settings

    def __repr__(self) -> str:
        return f"Painting({len(self.plan)} images, {len(self)} steps, model={self.model.name!r})"

    def __len__(self) -> int:
        return self.plan.levels.steps

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PaintingStep:
        if self._cancelled:
            raise StopIteration
        step = next(self._steps)
        self._latents, self._done = step.latents, step.index + 1
        self._collector.add(step.maps)
        return step

    def cancel(self) -> None:
        """End the painting: no step follows, and there is no result."""
        self._cancelled = True

    @property
    def result(self) -> Result:
        """Run the steps that are left, and decode the images.

        Raises :class:`Cancelled` after :meth:`cancel`, and after an error or an interruption in a step.
        """
        for _ in self:
            pass
        if self._cancelled:
            raise Cancelled("the painting was cancelled: it has no result")
        if self._latents is None or self._done < len(self):  # an error, or Ctrl-C, ended the steps
            raise Cancelled(f"the painting stopped after step {self._done} of {len(self)}: start it again")
        if self._result is None:
            self._result = self._finished(self._latents)
        return self._result

    @torch.no_grad()
    def _sample(self) -> Iterator[PaintingStep]:
        """Noise → text → network → guided denoiser → controls → sampler: a prompt's way to latents, step by step."""
        plan = self.plan
        noise = self._noise()
        start = self._start(noise)
        network = self._conditioned(start)
        denoise = plan.attached.around(Denoiser(network=network, guidance=plan.guidance), network)
        denoise = self._inpainted(denoise, start)
        for step in self._steps_of(denoise, start, noise):
            latents = denoise.finish(step.latents) if step.index == len(self) - 1 else step.latents
            if not latents.isfinite().all():
                raise ModelError(
                    f"the latents are not finite after step {step.index + 1} of {len(self)}: in float16 they may "
                    "overflow, so paint in float32 or bfloat16, or the weights are damaged"
                )
            yield PaintingStep(**{**vars(step), "latents": latents}, vae=self.engine.vae)

    @torch.no_grad()
    def network(self) -> ConditionedUNet:
        """Condition the U-Net anew, as the painting does, to ask it again about the latents of a step."""
        return self._conditioned(self._start(self._noise()))

    def _noise(self) -> NoiseSource:
        return NoiseSource(self._generators(), self.plan.shape, self.model.unet.device)

    def _conditioned(self, start: _Start) -> ConditionedUNet:
        """Give the U-Net the texts, controls and further channels of this painting."""
        positive, negative = self._encode_texts()
        return ConditionedUNet(
            unet=self.engine.unet,
            schedule=self.model.schedule,
            positive=positive,
            negative=negative,
            edits=self.plan.attached.edits,
            trace=self.plan.trace,
            also=self._encode_also(),
            extra_channels=start.extra_channels,
            shortcuts=self._shortcuts(),
        )

    def _encode_also(self) -> ExtraWords | None:
        """Encode the words that are looked for beside the prompt."""
        plan, model = self.plan, self.model
        return encode_words(
            model.text_encoder, model.tokenizer, plan.also, plan.syntax, plan.clip_skip, model.unet.dtype
        )

    def _shortcuts(self) -> ShortcutPlan | None:
        """Plan shortcuts where any are asked for."""
        plan = self.plan
        if plan.cache_interval == 1 and not plan.merge_tokens:
            return None
        return ShortcutPlan(
            cache_interval=plan.cache_interval,
            merge_tokens=plan.merge_tokens,
            last_timestep=plan.levels.timesteps[-1],
        )

    def _steps_of(self, denoise: ComposableDenoiser, start: _Start, noise: Callable[[], Tensor]) -> Iterator[Step]:
        """Sample, or as a control does it in a sampler's place."""
        sampling = self.plan.attached.sampling
        if sampling is not None:
            return sampling.steps(denoise, self.plan.levels, start.noise, noise)
        clean = start.clean if self.plan.from_image else None
        return sample_latents(self.plan.sampler, denoise, self.plan.levels, start.noise, noise, clean)

    def _generators(self) -> list[torch.Generator]:
        """Seed one generator on the CPU for each image, so that it depends on no neighbour and no device."""
        return [torch.Generator().manual_seed(settings["seed"]) for settings in self.settings]

    def _start(self, noise: NoiseSource) -> _Start:
        """Draw what sampling begins from, in diffusers' order: the image's latents, start noise, the masked image's."""
        plan, unet = self.plan, self.model.unet
        given, init = plan.latents, plan.init_image
        # A U-Net that inpaints sees what surrounds the mask, and needs the image's latents only to begin from them.
        needed = plan.attached.sampling is None and (plan.from_image or not inpaints(unet))
        clean = self._drawn_latents(init.images, noise) if init is not None and needed else None
        start_noise = noise() if given is None else given.to(unet.device, torch.float32)
        if init is None or init.mask is None:
            return _Start(noise=start_noise, clean=clean)
        mask = init.mask_latents(plan.latent_size)
        assert mask is not None
        mask = mask.to(unet.device)
        if not inpaints(unet):
            noise()  # diffusers draws the masked image's latents for every U-Net, though one of 4 channels sees none
            return _Start(noise=start_noise, clean=clean, mask=mask)
        masked = self._drawn_latents(init.masked_images, noise)
        return _Start(noise=start_noise, clean=clean, extra_channels=torch.cat([mask, masked], dim=1))

    def _inpainted(self, denoise: ComposableDenoiser, start: _Start) -> ComposableDenoiser:
        """Keep the image outside of the mask, for a U-Net that does not see it."""
        if start.mask is None:
            return denoise
        around = source_images if start.clean is None else noised_image(start.clean, start.noise)
        return Inpainting(denoise, start.mask, around)

    def _encode_texts(self) -> tuple[TextConditioning, TextConditioning]:
        """Encode each distinct prompt once; positive and negative ones are of the batch's length."""
        plan, model = self.plan, self.model
        chunks = [*plan.texts, *[plan.negative] * len(plan.texts)]
        encoded = {
            id(one): encode_chunks(model.text_encoder, model.tokenizer, one, plan.syntax, plan.clip_skip)
            for one in {id(one): one for one in chunks}.values()
        }
        text = batch_texts([encoded[id(one)].to(model.unet.dtype) for one in chunks])
        return text.rows(slice(0, len(plan))), text.rows(slice(len(plan), None))

    def _drawn_latents(self, images: Images, noise: NoiseSource) -> Latents:
        """Encode images, each drawn from its posterior by its own generator."""
        vae = self.model.vae
        posterior = vae.encode(images.to(vae.device, vae.dtype))
        drawn = posterior.mean.float() + torch.exp(0.5 * posterior.logvar.float()) * noise()
        return vae.config.scaling_factor * drawn

    @torch.no_grad()
    def _finished(self, latents: Latents) -> Result:
        plan = self.plan
        images = self._decoded(latents)
        if plan.init_image is not None:
            images = [plan.init_image.paste(index, image) for index, image in enumerate(images)]
        traced = None if plan.trace is None else self._heatmaps(images)
        return Result(images=images, latents=latents, settings=plan.settings, traced=traced)

    def _decoded(self, latents: Latents) -> list[Image.Image]:
        """Decode latents: a few at once where they are large, in tiles where that is asked for."""
        vae, tile = self.engine.vae, self.plan.tile
        if tile is not None:
            decoded = [vae.latents_to_large_images(latents.to(vae.dtype), tile, tile // 4)]
        else:
            at_once = max(1, MAX_DECODED_PIXELS // (latents[0, 0].numel() * vae.config.factor**2))
            decoded = [vae.latents_to_images(part.to(vae.dtype)) for part in latents.split(at_once)]
        if not all(part.isfinite().all() for part in decoded):
            raise ModelError(
                "the decoded image is not finite: this VAE overflows in float16, so paint in float32 or bfloat16"
            )
        return [image for part in decoded for image in tensor_to_images(part)]

    def _heatmaps(self, images: Sequence[Image.Image]) -> list[HeatMaps]:
        plan = self.plan
        return [
            self._collector.heatmaps(
                index,
                chunks.words.at_length(plan.length),
                image,
                plan.latent_size,
                also=beside_words(plan.also),
                negative=plan.negative.words.at_length(plan.length),
            )
            for index, (chunks, image) in enumerate(zip(plan.texts, images, strict=True))
        ]


@dataclass(kw_only=True)
class EditPainting:
    """An edit while it is painted: iterate over the steps of its paintings, or take the :attr:`result`.

    ``paintings`` yields each painting, with the number of steps of those that follow it, and returns the result;
    ``len()`` is the number of all steps.
    """

    paintings: Generator[tuple[Painting, int], None, Result] = field(repr=False)
    _painting: Painting = field(init=False, repr=False)
    _steps: int = field(init=False)
    _result: Result | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._painting, later = next(self.paintings)
        self._steps = len(self._painting) + later

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PaintingStep:
        while self._result is None:
            for step in self._painting:
                return step
            try:
                self._painting, _ = next(self.paintings)
            except StopIteration as end:
                self._result = end.value
        raise StopIteration

    def cancel(self) -> None:
        """End the edit: no step follows, and there is no result."""
        self._painting.cancel()

    @property
    def result(self) -> Result:
        """Run the steps that are left; the images before and after. Raises as :attr:`Painting.result`."""
        for _ in self:
            pass
        if self._result is None:
            raise Cancelled("the edit stopped before its end: it has no result")
        return self._result


@torch.no_grad()
def decode_previews(vae: LatentDecoder, denoised: Latents) -> list[Image.Image]:
    """Decode the clean latents of an image's steps, one after the other."""
    return [tensor_to_images(vae.latents_to_images(one[None].to(vae.dtype)))[0] for one in denoised]


def file_stem(settings: dict[str, Any]) -> str:
    """Name an image's file by its prompt and its seed."""
    return f"{file_slug(settings['prompt'])}-{settings['seed']}"


def file_slug(text: str) -> str:
    """Write a text in letters and digits of any script, and hyphens, as a part of a file's name."""
    text = unicodedata.normalize("NFC", text).lower()
    slug = re.sub(r"[\W_]+", "-", text)[:_NAME_LENGTH].strip("-") or "image"
    while len(slug.encode()) > 180:  # file systems take 255 bytes
        slug = slug[:-1]
    return slug


def _free_path(folder: Path, stem: str) -> Path:
    path = folder / f"{stem}.png"
    number = 2
    while path.exists():
        path = folder / f"{stem}-{number}.png"
        number += 1
    return path
