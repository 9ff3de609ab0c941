"""A prompt in, a stream of steps and then pictures out: everything put together."""

import html
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Generator, Tensor

from gobelin.adapters.lora import Loras
from gobelin.attention import Edit, Trace
from gobelin.checkpoint import Model, Recommended, open_model
from gobelin.checkpoint.diffusers_folder import save_folder
from gobelin.checkpoint.single_file import save_single_file
from gobelin.clip import TextEncoder
from gobelin.control.attention_control import (
    Blend,
    Blending,
    FlowEdit,
    Push,
    changed_words,
    followed,
    reweighted,
    tokens_of,
)
from gobelin.control.attention_guidance import Wish
from gobelin.control.flow_edit import flow_edit
from gobelin.denoiser import Denoiser
from gobelin.errors import ModelError, UsageError
from gobelin.formats.png import write_png
from gobelin.formats.textual_inversion import read_inversion
from gobelin.inpainting import canvas
from gobelin.look.heatmaps import Collector, HeatMaps
from gobelin.look.page import picture_url, word_map_element
from gobelin.prompt_weighting import Style, chunked, encode
from gobelin.samplers import NoiseSource, Step, sample
from gobelin.schedule import NoiseSchedule
from gobelin.settings import AnyEdit, Request, inpaints, latent_size, listed, request
from gobelin.tokenizer import Tokenizer, Word, Words
from gobelin.unet import UNet
from gobelin.vae import VAE

SHIPPED = "tiny"
MOST_PIXELS = 2**22
"""So many are decoded at once: at Stable Diffusion's size that takes some 7 GB."""


@dataclass(frozen=True, kw_only=True)
class PaintingStep(Step):
    """A sampler's step that can show what it sees."""

    vae: VAE

    def preview(self, index: int = 0) -> Image.Image:
        """Image ``index`` of the batch as it is guessed at this step."""
        with torch.no_grad():
            return to_pil(self.vae.latents_to_images(self.denoised[index : index + 1].to(self.vae.dtype)))[0]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Painted pictures, with the latents [B, 4, h, w] and, for each, the settings that repeat it.

    Where it was asked for, ``heatmaps`` say for each which word painted what.
    """

    images: list[Image.Image]
    latents: Float[Tensor, "batch channels h w"]
    settings: list[dict[str, Any]]
    traced: list[HeatMaps] | None = None

    @property
    def heatmaps(self) -> list[HeatMaps]:
        """A picture's heat maps each; :class:`UsageError` where they were not traced."""
        if self.traced is None:
            raise UsageError("these pictures were painted without a trace: paint with trace=True")
        return self.traced

    def _repr_html_(self) -> str:
        if self.traced is not None:
            return "".join(word_map_element(heatmaps) for heatmaps in self.traced)
        pairs = zip(self.images, self.settings, strict=True)
        return "".join(f'<img src="{picture_url(image)}" alt="{html.escape(made["prompt"])}">' for image, made in pairs)

    def save(self, folder: str | Path) -> list[Path]:
        """Write PNGs that carry their settings, never over an existing file; returns their paths."""
        paths = []
        for image, settings in zip(self.images, self.settings, strict=True):
            path = _free_path(Path(folder), picture_name(settings))
            write_png(path, image, settings)
            paths.append(path)
        return paths


class Pipeline:
    """A text encoder, a U-Net and a VAE, with the tokenizer and the noise schedule that they were trained with.

    ``world`` names the world of scenes that they know, where they were trained on one.
    """

    def __init__(
        self,
        *,
        unet: UNet,
        vae: VAE,
        text_encoder: TextEncoder,
        tokenizer: Tokenizer,
        schedule: NoiseSchedule,
        recommended: Recommended | None = None,
        world: str | None = None,
        name: str = "",
    ):
        self.unet, self.vae, self.text_encoder = unet.eval(), vae.eval(), text_encoder.eval()
        self.tokenizer, self.schedule = tokenizer, schedule
        self.recommended = recommended or Recommended()
        self.world = world
        self.name = name
        self.loras = Loras({"unet": self.unet, "text_encoder": self.text_encoder})
        self.learned_words: list[str] = []
        self._refuse_misfits()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Open a model: the one that ships with Gobelin, a diffusers folder, an original ``.safetensors`` or ``.ckpt``
        file, or a repository of the Hub by its name.

        ``device`` None takes the best there is (cuda, mps, cpu); ``dtype`` None takes float32. The other options are
        those of :func:`gobelin.checkpoint.open_model`. Raises :class:`ModelError` that names the file and what is wrong
        with it.
        """
        model = open_model(
            shipped_model() if path is None else path, find_device(device), dtype or torch.float32, **options
        )
        return cls(**vars(model))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a diffusers folder, in ``dtype`` or in the weights' own precision; the index comes last."""
        save_folder(self.model, Path(folder), dtype)

    def save_single_file(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a ``.safetensors`` file as the original code lays it out; it has no place for the tokenizer."""
        save_single_file(self.model, Path(path), dtype)

    @property
    def model(self) -> Model:
        """What the pipeline paints with."""
        return Model(
            unet=self.unet,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            schedule=self.schedule,
            recommended=self.recommended,
            world=self.world,
            name=self.name,
        )

    def load_lora(
        self, path: str | Path, weight: float = 1.0, name: str | None = None, allow_pickle: bool = False
    ) -> str:
        """Add a LoRA of kohya's, diffusers' or PEFT's layout, so many times as strong as it was trained.

        Returns what it goes by in ``loras``, where its weight can be changed and it can be taken out. Raises
        :class:`ModelError` that names what of the file does not fit this model.
        """
        return self.loras.add(Path(path), weight, name, allow_pickle)

    def load_textual_inversion(self, path: str | Path, token: str | None = None, allow_pickle: bool = False) -> str:
        """Add a word that was learned; returns the word, ``token`` or the file's own, to be used in prompts.

        Raises :class:`ModelError` for a file that is none, and :class:`UsageError` for vectors of another width.
        """
        named, vectors = read_inversion(Path(path), allow_pickle)
        word = token or named
        self.tokenizer.refuse_known(word)
        self.tokenizer.add_word(word, self.text_encoder.add_vectors(vectors))
        self.learned_words.append(word)
        return word

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        on_step: Callable[[PaintingStep], None] = lambda step: None,
        **options: Any,
    ) -> Result:
        """Paint; the options are those of :meth:`stream`, and ``on_step`` hears of each step.

        Results are in prompt-major order, then by count.
        """
        asked = self._asked(prompt, options)
        latents, collector = torch.empty(0), Collector(asked.trace or Trace())
        for step in self._steps(asked):
            latents = step.latents
            collector.add(step.maps)
            on_step(step)
        with torch.no_grad():
            images = self._decoded(latents, asked.tile)
        if asked.canvas is not None:
            images = [asked.canvas.kept(index, image) for index, image in enumerate(images)]
        traced = None if asked.trace is None else self._heatmaps(asked, collector, images)
        return Result(images=images, latents=latents, settings=asked.settings, traced=traced)

    def stream(self, prompt: str | Sequence[str], **options: Any) -> Iterator[PaintingStep]:
        """Paint step by step, for one prompt or several.

        Options: ``negative_prompt`` str; ``seed`` int, the first picture's, the others' following it,
        or one for each; None draws one; ``steps``, ``guidance``,
        ``guidance_rescale``, ``sampler``, None for what the model recommends; ``height`` and ``width`` in pixels,
        None for the model's own; ``count`` pictures a prompt; ``latents`` [B, 4, h, w], start noise of your own;
        ``init_image`` one picture or one for each, which is painted over by the share ``strength`` of the steps, at its
        own size unless another is given; ``mask`` likewise, white where to paint: elsewhere pixels stay what they were;
        ``clip_skip`` layers of the text encoder to leave out; ``weights`` "a1111", "comfyui" or "none", in whose
        meaning ``(word:1.2)`` is read (:mod:`prompt_weighting`); ``tile`` latents a side, to decode large pictures in
        tiles; ``trace`` True for every step's ``maps`` of what looked
        at which word, "sharp" for heat maps that point best (:meth:`gobelin.look.heatmaps.HeatMaps.sharpened`), or a
        :class:`gobelin.attention.Trace` that says more; ``edit`` one or several of
        :mod:`attention_control` and :mod:`attention_guidance`, or a plain ``change(site, probs) -> probs``.
        Raises :class:`UsageError` for what cannot be painted.
        """
        return self._steps(self._asked(prompt, options))

    def edit(
        self,
        prompt: str,
        to: str,
        *,
        seed: int | None = 0,
        init_image: Image.Image | None = None,
        strength: float = 1.0,
        cross: float = 0.8,
        own: float = 0.6,
        push: float = 2.0,
        blend: Sequence[Word] | None = None,
        reweight: Mapping[Word, float] | None = None,
        together: bool = False,
        **options: Any,
    ) -> Result:
        """Two pictures: of ``prompt``, and the same as ``to`` would have it.

        The first is painted, or is ``init_image``, of which ``prompt`` says what is on it. Then it is changed by the
        share ``strength`` of the way from noise (:class:`FlowEdit`), with prompt-to-prompt:
        ``cross`` and ``own`` are those of :func:`followed`. ``push`` is the strength of
        :class:`Push`. Outside of the pixels of the ``blend`` words, of either prompt, nothing
        changes; None takes the words that changed. ``reweight`` says how many times as much words of ``to`` are looked
        at. The other options are those of :meth:`stream`, without ``count``: an ``edit`` comes after these and concerns
        the change alone, and what is black in a ``mask`` stays. ``together`` paints both at once, from the same noise:
        the paper's method alone is ``together=True, own=0.4, push=0, blend=()``.
        """
        if options.pop("count", 1) != 1:
            raise UsageError("an edit paints two pictures: leave out count")
        if together and init_image is not None:
            raise UsageError("a picture that is there cannot be painted together with another: leave out together")
        if not 0 < strength <= 1:
            raise UsageError(f"the strength is {strength}: give more than 0 (the picture as it is), and 1 at most")
        if seed is None:
            seed = int(torch.randint(2**31, ()).item())
        size = latent_size(self.model, options.get("height"), options.get("width"), init_image)
        source, target = (self.words(text, options.get("weights", "a1111")) for text in (prompt, to))
        edits: list[AnyEdit] = [*followed(source, target, size, cross, own)]
        if reweight:
            edits.append(reweighted(target, reweight, rows=[1]))
        if push:
            edits.append(Push(strength=push))
        words = changed_words(source, target) if blend is None else tokens_of(source, target, blend)
        if any(words):
            edits.append(Blend(tokens=words, latent_size=size))
        edits += listed(options.pop("edit", ()))
        prompts, seeds = [prompt, to], [seed, seed]
        if together:
            return self(prompts, seed=seeds, edit=edits, **options)
        mask = options.pop("mask", None)
        first = None
        if init_image is None:
            first = self(prompt, seed=seed, **options)
            picture, latents = first.images[0], first.latents
            options.pop("latents", None)
        else:
            picture, latents = self._fitted(init_image, size)
        if mask is not None:
            options |= {"init_image": picture, "mask": mask, "strength": 1.0}
        factor = self.vae.config.factor
        options |= {"height": size[0] * factor, "width": size[1] * factor}
        edits.append(FlowEdit(latents=latents, strength=strength))
        both = self(prompts, seed=seeds, edit=edits, **options)
        return Result(
            images=[picture, both.images[1]],
            latents=both.latents,
            settings=[(first or both).settings[0], both.settings[1]],
            traced=None if both.traced is None else [(first or both).heatmaps[0], both.heatmaps[1]],
        )

    def latent_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of the latents of a picture that is ``height`` × ``width`` pixels, None: the model's own.

        Raises :class:`UsageError` for a size that cannot be painted.
        """
        return latent_size(self.model, height, width)

    def _asked(self, prompt: str | Sequence[str], options: Mapping[str, Any]) -> Request:
        return request(self.model, prompt, loras=self.loras.weights, learned_words=self.learned_words, **options)

    def _decoded(self, latents: Tensor, tile: int | None) -> list[Image.Image]:
        """Pictures of latents: one by one where there are many or they are large, in tiles where that is asked for."""
        latents = latents.to(self.vae.dtype)
        if tile is not None:
            return to_pil(self.vae.latents_to_large_images(latents, tile, tile // 4))
        at_once = max(1, MOST_PIXELS // (latents[0, 0].numel() * self.vae.config.factor**2))
        return [image for part in latents.split(at_once) for image in to_pil(self.vae.latents_to_images(part))]

    def _heatmaps(self, asked: Request, collector: Collector, images: list[Image.Image]) -> list[HeatMaps]:
        found_maps = [collector.maps(index) for index in range(len(images))]
        found = [
            HeatMaps(
                words=replace(self.words(settings["prompt"], settings["weights"]), length=asked.length),
                maps=maps,
                latent_size=(asked.shape[1], asked.shape[2]),
                picture=image,
            )
            for settings, maps, image in zip(asked.settings, found_maps, images, strict=True)
        ]
        return [heatmaps.sharpened() for heatmaps in found] if asked.sharpen else found

    @torch.no_grad()
    def _steps(self, asked: Request) -> Iterator[PaintingStep]:
        options = asked.settings[0]
        device = self.unet.device
        generators = [Generator().manual_seed(settings["seed"]) for settings in asked.settings]
        noise = NoiseSource(generators, asked.shape, device)
        begun = asked.canvas
        flow = next((one for one in asked.edits if isinstance(one, FlowEdit)), None)
        # A U-Net that inpaints is shown what is around a hole, and has no use for the rest but to begin with it.
        wanted = flow is None and (asked.over or not inpaints(self.unet))
        clean = self._drawn_latents(begun.images, noise) if begun is not None and wanted else None
        start_noise = noise() if asked.latents is None else asked.latents.to(device, torch.float32)
        holes = None if begun is None else begun.holes(asked.shape[1:])
        beside = None
        if begun is not None and holes is not None:
            holes = holes.to(device)
            # diffusers draws these for every U-Net, though one with four channels does not look at them.
            masked = self._drawn_latents(begun.masked, noise) if inpaints(self.unet) else noise()
            beside = torch.cat([holes, masked], dim=1) if inpaints(self.unet) else None
        texts = [settings[which] for which in ("prompt", "negative_prompt") for settings in asked.settings]
        embeddings = self.encode_text(texts, options["clip_skip"], options["weights"])
        blendings = [Blending(one) for one in asked.edits if isinstance(one, Blend)]
        calls = count()

        def adjusted(latents: Tensor, way: float, alpha_cumprod: float) -> Tensor:
            for blending in blendings:
                latents = blending.applied(latents, way)
            if holes is None or beside is not None:
                return latents
            if clean is None:
                around = latents.chunk(2)[0].repeat(2, 1, 1, 1)
            elif next(calls):
                around = math.sqrt(alpha_cumprod) * clean + math.sqrt(1 - alpha_cumprod) * start_noise
            else:
                return latents
            return (1 - holes) * around + holes * latents

        denoiser = Denoiser(
            unet=self.unet,
            schedule=self.schedule,
            text_embeddings=embeddings[: len(asked.settings)],
            negative_embeddings=embeddings[len(asked.settings) :],
            guidance=options["guidance"],
            guidance_rescale=options["guidance_rescale"],
            trace=asked.trace,
            edits=(
                *(edit for edit in asked.edits if isinstance(edit, Edit)),
                *(blending.edit for blending in blendings),
            ),
            wishes=tuple(wish for wish in asked.edits if isinstance(wish, Wish)),
            pushes=tuple(push for push in asked.edits if isinstance(push, Push)),
            adjust=adjusted,
            beside=beside,
        )
        if flow is None:
            steps = sample(options["sampler"], denoiser, asked.grid, start_noise, noise, clean if asked.over else None)
        else:
            steps = flow_edit(denoiser, flow.latents.to(device).repeat(2, 1, 1, 1), asked.grid, noise, flow.gain)
        for step in steps:
            latents = adjusted(step.latents, 1.0, 1.0) if step.index == asked.grid.steps - 1 else step.latents
            yield PaintingStep(**{**vars(step), "latents": latents}, vae=self.vae)

    @torch.no_grad()
    def _fitted(self, picture: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, Tensor]:
        """A picture, and its latents, which are to be ``size``."""
        height, width = (side * self.vae.config.factor for side in size)
        images = canvas(picture, None, 1.0, 1, (height, width)).images
        latents = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).mean.float()
        return to_pil(images)[0], self.vae.config.scaling_factor * latents

    def _drawn_latents(self, images: Tensor, noise: NoiseSource) -> Tensor:
        """Latents of pictures, each drawn from its posterior by its own generator."""
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        drawn = posterior.mean.float() + torch.exp(0.5 * posterior.logvar.float()) * noise()
        return self.vae.config.scaling_factor * drawn

    def _refuse_misfits(self) -> None:
        text, unet, vae = self.text_encoder.config, self.unet.config, self.vae.config
        longest, last = self.tokenizer.max_length, max(self.tokenizer.vocab.values())
        for fits, what in (
            (
                longest <= text.max_position_embeddings,
                "the tokenizer gives more tokens than the text encoder has places",
            ),
            (last < text.vocab_size, "the tokenizer has tokens that the text encoder does not know"),
            (text.hidden_size == unet.cross_attention_dim, "the U-Net expects text embeddings of another width"),
            (
                unet.in_channels in (vae.latent_channels, 2 * vae.latent_channels + 1),
                "the U-Net expects latents with other channels than the VAE's",
            ),
        ):
            if not fits:
                raise ModelError(f"the parts of this model do not belong together: {what}")

    def words(self, prompt: str, weights: Style = "a1111") -> Words:
        """The words of a prompt without its weights, to be asked for their tokens."""
        return chunked(self.tokenizer, prompt, weights).words

    @torch.no_grad()
    def encode_text(
        self, texts: Sequence[str], clip_skip: int = 0, weights: Style = "a1111"
    ) -> Float[Tensor, "batch length width"]:
        """Text embeddings of prompts, each distinct one computed once, all as long as the longest of them.

        ``weights`` says in whose meaning words have them (:mod:`prompt_weighting`).
        """
        distinct = [chunked(self.tokenizer, text, weights) for text in dict.fromkeys(texts)]
        most = max(len(chunks.token_ids) for chunks in distinct)
        nothing = chunked(self.tokenizer, "", "none")
        empty = self.text_encoder(nothing.token_ids.to(self.text_encoder.device), clip_skip)
        embeddings = {}
        for text, chunks in zip(dict.fromkeys(texts), distinct, strict=True):
            found = encode(self.text_encoder, chunks, empty, weights, clip_skip)
            embeddings[text] = torch.cat([found, *[empty[0]] * (most - len(chunks.token_ids))])
        return torch.stack([embeddings[text] for text in texts]).to(self.unet.dtype)


def shipped_model() -> Path:
    """The folder of the model that comes with Gobelin."""
    return Path(str(files("gobelin") / "models" / SHIPPED))


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; for None and "auto", the first of cuda, mps and cpu that is there.

    Raises :class:`UsageError` with the choices for a device that this machine does not have.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    choices = [kind for kind, available in there.items() if available]
    if name in (None, "auto"):
        return torch.device(choices[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in choices or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UsageError(f"unknown device {str(name)!r}: the choices on this machine are {', '.join(choices)}")
    return device


def to_pil(images: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Images in [-1, 1], clamped to it, as 8-bit pictures."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(level)) for level in levels]


def picture_name(settings: dict[str, Any]) -> str:
    """What a picture's file is called: its prompt, as letters and digits, at most 60, and its seed."""
    slug = re.sub(r"[^a-z0-9]+", "-", settings["prompt"].lower())[:60].strip("-") or "picture"
    return f"{slug}-{settings['seed']}"


def _free_path(folder: Path, stem: str) -> Path:
    path = folder / f"{stem}.png"
    number = 2
    while path.exists():
        path = folder / f"{stem}-{number}.png"
        number += 1
    return path
