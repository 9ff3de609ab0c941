"""A prompt in, a stream of steps and then pictures out: everything put together."""

import dataclasses
import html
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Generator, Tensor

from gobelin.attention import Change, Edit, Trace, choose_sites
from gobelin.clip import TextEncoder
from gobelin.denoiser import Denoiser
from gobelin.errors import ModelError, UsageError
from gobelin.formats.component import DIFFUSERS_VERSION, config_from_json
from gobelin.formats.files import read_json, write_json
from gobelin.formats.png import write_png
from gobelin.look.edits import Blend, Blending, blended, followed, reweighted
from gobelin.look.heatmaps import Collector, HeatMaps, sharp_trace
from gobelin.look.page import framed_page, picture_url
from gobelin.look.wishes import Wish, held
from gobelin.samplers import NoiseSource, Step, find_grid, sample
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer, Word
from gobelin.unet import UNet
from gobelin.vae import VAE

AnyEdit = Change | Edit | Wish | Blend

SHIPPED = "tiny"
MAX_SEED = 2**63 - 1
MODEL_INDEX = "model_index.json"
OURS = "gobelin.json"
EDITED = "edited"
"""In a picture's settings where it was painted with edits, which they do not hold: they do not repeat it."""


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """How a model asks to be sampled; read from ``gobelin.json`` where its folder has one."""

    sampler: str = "dpmpp_2m"
    steps: int = 25
    guidance: float = 7.5
    guidance_rescale: float = 0.0


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
            return "".join(framed_page(heatmaps) for heatmaps in self.traced)
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
        self._refuse_misfits()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Open a model: the one that ships with Gobelin, or a diffusers folder.

        ``device`` None takes the best there is (cuda, mps, cpu); ``dtype`` None takes float32. Raises
        :class:`ModelError` that names the file and what is wrong with it.
        """
        folder = shipped_model() if path is None else Path(path)
        if not (folder / MODEL_INDEX).is_file():
            raise ModelError(f"no model at {folder}: expected a folder with a {MODEL_INDEX}")
        device = find_device(device)
        dtype = dtype or torch.float32
        scheduler = folder / "scheduler" / "scheduler_config.json"
        ours = folder / OURS
        said = read_json(ours) if ours.is_file() else {}
        if not isinstance(world := said.get("world"), str | None):
            raise ModelError(f"{ours}: world is {world!r}, expected the name of a world of scenes")
        return cls(
            unet=UNet.from_pretrained(folder / "unet", dtype).to(device),
            vae=VAE.from_pretrained(folder / "vae", dtype).to(device),
            text_encoder=TextEncoder.from_pretrained(folder / "text_encoder", dtype).to(device),
            tokenizer=Tokenizer.from_pretrained(folder / "tokenizer"),
            schedule=NoiseSchedule(config_from_json(ScheduleConfig, read_json(scheduler), scheduler)),
            recommended=config_from_json(Recommended, said, ours),
            world=world,
            name=folder.resolve().name,
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a diffusers folder, in ``dtype`` or in the weights' own precision; the index comes last."""
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet", dtype)
        self.vae.save_pretrained(folder / "vae", dtype)
        self.text_encoder.save_pretrained(folder / "text_encoder", dtype)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json(self.schedule.config))
        known = {} if self.world is None else {"world": self.world}
        write_json(folder / OURS, dataclasses.asdict(self.recommended) | known)
        write_json(folder / MODEL_INDEX, MODEL_INDEX_JSON)

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
        request = self._request(prompt, **options)
        latents, collector = torch.empty(0), Collector(request.trace or Trace())
        for step in self._steps(request):
            latents = step.latents
            collector.add(step.maps)
            on_step(step)
        with torch.no_grad():
            images = to_pil(self.vae.latents_to_images(latents.to(self.vae.dtype)))
        traced = None if request.trace is None else self._heatmaps(request, collector, images)
        return Result(images=images, latents=latents, settings=request.settings, traced=traced)

    def stream(self, prompt: str | Sequence[str], **options: Any) -> Iterator[PaintingStep]:
        """Paint step by step, for one prompt or several.

        Options: ``negative_prompt`` str; ``seed`` int, the first picture's, the others' following it,
        or one for each; None draws one; ``steps``, ``guidance``,
        ``guidance_rescale``, ``sampler``, None for what the model recommends; ``height`` and ``width`` in pixels,
        None for the model's own; ``count`` pictures a prompt; ``latents`` [B, 4, h, w], start noise of your own;
        ``clip_skip`` layers of the text encoder to leave out; ``trace`` True for every step's ``maps`` of what looked
        at which word, "sharp" for heat maps that point best (:meth:`gobelin.look.heatmaps.HeatMaps.sharpened`), or a
        :class:`gobelin.attention.Trace` that says more; ``edit`` one or several of
        :mod:`gobelin.look.edits` and :mod:`gobelin.look.wishes`, or a plain ``change(site, probs) -> probs``.
        Raises :class:`UsageError` for what cannot be painted.
        """
        return self._steps(self._request(prompt, **options))

    def edit(
        self,
        prompt: str,
        to: str,
        *,
        seed: int | None = 0,
        cross: float = 0.8,
        own: float = 0.4,
        hold: float = 0.0,
        weights: Mapping[Word, float] | None = None,
        blend: Sequence[Word] = (),
        **options: Any,
    ) -> Result:
        """Two pictures: of ``prompt``, and of ``to`` with the first one's layout (prompt-to-prompt).

        ``cross`` and ``own`` are those of :func:`gobelin.look.edits.followed`, and ``hold`` is the strength of
        :func:`gobelin.look.wishes.held`; ``weights`` say how many times as much words of ``to`` are looked at; outside
        of the pixels of the ``blend`` words, of either prompt, nothing changes. The other options are those of
        :meth:`stream`, without ``count``; an ``edit`` comes after these.
        """
        if options.pop("count", 1) != 1:
            raise UsageError("an edit paints two pictures: leave out count")
        if seed is None:
            seed = int(torch.randint(2**31, ()).item())
        size = self.latent_size(options.get("height"), options.get("width"))
        source, target = self.tokenizer.words(prompt), self.tokenizer.words(to)
        edits: list[AnyEdit] = [*followed(source, target, size, cross, own)]
        if hold and (wish := held(source, target, size, hold)):
            edits.append(wish)
        if weights:
            edits.append(reweighted(target, weights, rows=[1]))
        if blend:
            edits.append(blended(source, target, blend, size))
        edits += _listed(options.pop("edit", ()))
        return self([prompt, to], seed=[seed, seed], edit=edits, **options)

    def _request(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        seed: int | Sequence[int] | None = 0,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_rescale: float | None = None,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        count: int = 1,
        latents: Float[Tensor, "batch channels h w"] | None = None,
        clip_skip: int = 0,
        trace: bool | str | Trace = False,
        edit: AnyEdit | Sequence[AnyEdit] = (),
    ) -> "_Request":
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(text.strip() for text in prompts):
            raise UsageError("the prompt is empty: say in a few words what to paint")
        if count < 1:
            raise UsageError(f"count is {count}: give 1 or more")
        for text in dict.fromkeys([*prompts, negative_prompt]):
            if cut := self.tokenizer.cut(text):
                warnings.warn(
                    f"the prompt is longer than this model's {self.tokenizer.max_length} tokens, so its end is "
                    f"left out: {cut!r}",
                    stacklevel=3,
                )
        if seed is None:
            seed = int(torch.randint(2**31, ()).item())
        total = len(prompts) * count
        seeds = range(seed, seed + total) if isinstance(seed, int) else list(seed)
        if len(seeds) != total:
            raise UsageError(f"{len(seeds)} seeds given for {total} pictures: give one for each, or the first one's")
        if wrong := [seed for seed in seeds if not 0 <= seed <= MAX_SEED]:
            raise UsageError(f"the seed is {wrong[0]}: give a number from 0 to {MAX_SEED - total + 1}")
        height, width = (self._side if given is None else given for given in (height, width))
        shape = (self.unet.config.in_channels, *self.latent_size(height, width))
        if latents is not None and tuple(latents.shape) != (total, *shape):
            raise UsageError(f"the start latents are {list(latents.shape)}: expected {[total, *shape]}")
        steps = self.recommended.steps if steps is None else steps
        last = find_grid(sampler or self.recommended.sampler, self.schedule, steps).timesteps[-1]
        if not 0 <= clip_skip < self.text_encoder.config.num_hidden_layers:
            raise UsageError(
                f"clip_skip is {clip_skip}: give a number from 0 to {self.text_encoder.config.num_hidden_layers - 1}"
            )
        if isinstance(trace, str) and trace != "sharp":
            raise UsageError(f'trace is {trace!r}: give True, False, "sharp" or a gobelin.attention.Trace')
        if trace == "sharp":
            traced = sharp_trace(self.unet.attention_sites, (shape[1], shape[2]))
        else:
            traced = trace if isinstance(trace, Trace) else Trace() if trace else None
        if traced is not None:
            if not 0 <= traced.start <= 1:
                raise UsageError(f"a trace starts at {traced.start:g} of the way: give a share from 0 to 1")
            traced = replace(traced, start=min(traced.start, self.schedule.way(last)))
        edits = [asked if isinstance(asked, Edit | Wish | Blend) else Edit(change=asked) for asked in _listed(edit)]
        for asked in (traced, *edits):
            if isinstance(asked, Trace | Edit | Wish):
                choose_sites(self.unet.attention_sites, asked.sites)
            if isinstance(asked, Wish | Blend) and asked.rows is not None and max(asked.rows, default=0) >= total:
                raise UsageError(f"an edit is about picture {max(asked.rows)} of a batch of {total}: the first is 0")
        common = {
            "negative_prompt": negative_prompt,
            "steps": steps,
            "guidance": self.recommended.guidance if guidance is None else guidance,
            "guidance_rescale": (self.recommended.guidance_rescale if guidance_rescale is None else guidance_rescale),
            "sampler": sampler or self.recommended.sampler,
            "height": height,
            "width": width,
            "clip_skip": clip_skip,
            "model": self.name,
            **({EDITED: True} if edits else {}),
        }
        repeated = [text for text in prompts for _ in range(count)]
        settings = [{"prompt": text, "seed": seed, **common} for text, seed in zip(repeated, seeds, strict=True)]
        return _Request(
            settings=settings,
            shape=shape,
            latents=latents,
            trace=traced,
            sharpen=trace == "sharp",
            edits=tuple(edits),
        )

    def latent_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of the latents of a picture that is ``height`` × ``width`` pixels, None: the model's own.

        Raises :class:`UsageError` for a size that cannot be painted.
        """
        height, width = (self._side if given is None else given for given in (height, width))
        factor = self.vae.config.factor
        if height < factor or width < factor or height % factor or width % factor:
            raise UsageError(
                f"{width}×{height} pixels asked for: this model paints sizes that are multiples of {factor}"
            )
        return height // factor, width // factor

    @property
    def _side(self) -> int:
        """The model's own height and width in pixels."""
        return self.unet.config.sample_size * self.vae.config.factor

    def _heatmaps(self, request: "_Request", collector: Collector, images: list[Image.Image]) -> list[HeatMaps]:
        found = [
            HeatMaps(
                words=self.tokenizer.words(request.settings[index]["prompt"]),
                maps=collector.maps(index),
                latent_size=(request.shape[1], request.shape[2]),
                picture=image,
            )
            for index, image in enumerate(images)
        ]
        return [heatmaps.sharpened() for heatmaps in found] if request.sharpen else found

    @torch.no_grad()
    def _steps(self, request: "_Request") -> Iterator[PaintingStep]:
        options = request.settings[0]
        device = self.unet.device
        generators = [Generator().manual_seed(settings["seed"]) for settings in request.settings]
        noise = NoiseSource(generators, request.shape, device)
        start_noise = noise() if request.latents is None else request.latents.to(device, torch.float32)
        blendings = [Blending(blend) for blend in request.edits if isinstance(blend, Blend)]

        def adjusted(latents: Tensor, way: float) -> Tensor:
            for blending in blendings:
                latents = blending.applied(latents, way)
            return latents

        denoiser = Denoiser(
            unet=self.unet,
            schedule=self.schedule,
            text_embeddings=self.encode_text([s["prompt"] for s in request.settings], options["clip_skip"]),
            negative_embeddings=self.encode_text(
                [s["negative_prompt"] for s in request.settings], options["clip_skip"]
            ),
            guidance=options["guidance"],
            guidance_rescale=options["guidance_rescale"],
            trace=request.trace,
            edits=(
                *(edit for edit in request.edits if isinstance(edit, Edit)),
                *(blending.edit for blending in blendings),
            ),
            wishes=tuple(wish for wish in request.edits if isinstance(wish, Wish)),
            adjust=adjusted,
        )
        steps = sample(options["sampler"], denoiser, self.schedule, start_noise, options["steps"], noise)
        for step in steps:
            latents = adjusted(step.latents, 1.0) if step.index == options["steps"] - 1 else step.latents
            yield PaintingStep(**{**vars(step), "latents": latents}, vae=self.vae)

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
            (vae.latent_channels == unet.in_channels, "the U-Net expects latents with other channels than the VAE's"),
        ):
            if not fits:
                raise ModelError(f"the parts of this model do not belong together: {what}")

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], clip_skip: int = 0) -> Float[Tensor, "batch length width"]:
        """Text embeddings of prompts, each distinct one computed once."""
        distinct = list(dict.fromkeys(texts))
        embeddings = self.text_encoder(self.tokenizer(distinct).to(self.text_encoder.device), clip_skip)
        return embeddings[[distinct.index(text) for text in texts]].to(self.unet.dtype)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A checked request: the settings of every picture, the shape of its latents, what to look at and to change."""

    settings: list[dict[str, Any]]
    shape: tuple[int, int, int]
    latents: Tensor | None
    trace: Trace | None
    sharpen: bool
    edits: tuple[Edit | Wish | Blend, ...]


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


def scheduler_json(config: ScheduleConfig) -> dict[str, Any]:
    """The noise schedule as diffusers' ``DDIMScheduler`` reads it."""
    fields = dataclasses.asdict(config)
    fields["timestep_spacing"] = config.timestep_spacing or "leading"
    header = {"_class_name": "DDIMScheduler", "_diffusers_version": DIFFUSERS_VERSION}
    return {**header, **fields, "clip_sample": False, "trained_betas": None}


MODEL_INDEX_JSON = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _listed(edit: AnyEdit | Sequence[AnyEdit]) -> list[AnyEdit]:
    return list(edit) if isinstance(edit, Sequence) else [edit]


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
