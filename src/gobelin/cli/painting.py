"""What the commands that open models and paint share: their options, and painting where someone may be looking."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from gobelin.errors import DataError, UsageError
from gobelin.pipeline import SHIPPED, PaintingStep, Pipeline, Result
from gobelin.settings import EDITED, LEARNED_WORDS, LORAS, refuse_odd, request

NEEDED = (LORAS, LEARNED_WORDS)
"""What of a picture's settings is no option of painting, but has to be there."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which files a model is opened from."""

    vae: Path | None = None
    """A VAE, folder or file, in place of the model's own."""
    tokenizer: Path | None = None
    """The folder of a tokenizer, for a single file, which has none."""
    variant: str | None = None
    """Of a folder's files: fp16, for one."""
    allow_pickle: bool = False
    """Open .ckpt, .bin and .pt files too; tensors are all that is read of them."""
    ema: bool = False
    """Of a single file, the average of the U-Net's weights."""

    def files(self) -> dict[str, Any]:
        """The options as :func:`gobelin.checkpoint.open_model` takes them."""
        names = ("vae", "tokenizer", "variant", "allow_pickle", "ema")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class PaintingOptions(ModelOptions):
    """How to paint: what every command that paints can be told."""

    model: str | None = None
    """A diffusers folder, a .safetensors or .ckpt file, or a Hub name; without one, the model of Gobelin's own."""
    out: Path = Path("out")
    """Where the files go."""
    seed: int | None = None
    """The first picture's; without one it is drawn, and kept in the picture."""
    steps: int | None = None
    """How many denoising steps; without it, what the model recommends, as for the next three."""
    guidance: float | None = None
    """How hard to follow the prompt; 1 is not at all harder than the data."""
    guidance_rescale: float | None = None
    """0 to 1: take back the contrast that guidance adds."""
    sampler: str | None = None
    """ddpm, ddim, pndm, lcm, euler, euler_ancestral, heun, lms, dpm_2, dpm_2_ancestral, dpmpp_2m, dpmpp_2m_sde, uni_pc
    or deis; most also with _karras."""
    negative: str | None = None
    """What to steer away from."""
    height: int | None = None
    """In pixels; without it, the model's own."""
    width: int | None = None
    """In pixels; without it, the model's own."""
    clip_skip: int | None = None
    """How many of the text encoder's last layers to leave out; none without it."""
    weights: Literal["a1111", "comfyui", "none"] | None = None
    """In whose meaning (word:1.2) is read; without it, a1111."""
    lora: tuple[str, ...] = ()
    """FILE or FILE:WEIGHT: LoRAs to add."""
    inversion: tuple[Path, ...] = ()
    """Textual inversions to add; each file's name is its word, unless it names one."""
    device: str | None = None
    """cpu, cuda or mps; without it, or with auto, the best there is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision to compute in."""

    def open(self) -> Pipeline:
        """The model that was asked for, with what is added to it."""
        pipeline = Pipeline.from_pretrained(self.model, self.device, getattr(torch, self.dtype), **self.files())
        for asked in self.lora:
            file, weight = _weighed(asked)
            pipeline.load_lora(file, weight, allow_pickle=self.allow_pickle)
        for file in self.inversion:
            pipeline.load_textual_inversion(file, allow_pickle=self.allow_pickle)
        return pipeline

    def settings(self) -> dict[str, Any]:
        """What was asked for, as :meth:`Pipeline.stream` takes it; the seed is None where none was."""
        settings = {
            "negative_prompt": self.negative,
            "steps": self.steps,
            "guidance": self.guidance,
            "guidance_rescale": self.guidance_rescale,
            "sampler": self.sampler,
            "height": self.height,
            "width": self.width,
            "clip_skip": self.clip_skip,
            "weights": self.weights,
        }
        return {"seed": self.seed, **{name: value for name, value in settings.items() if value is not None}}


def repeatable(settings: dict[str, Any], file: Path, model: str | None) -> dict[str, Any]:
    """What a picture of Gobelin's says of itself, as :meth:`Pipeline.stream` takes it, with what is ``NEEDED``.

    Raises :class:`UsageError` for one that was painted with edits, which its settings do not hold, for settings that
    this version does not know, and where no ``model`` is given for a picture of another than Gobelin's own.
    """
    if EDITED in settings:
        raise UsageError(f"{file} was painted with an edit, which a picture does not remember: take a plain one")
    known = {*signature(request).parameters} - {"trace", "edit", "latents", "count", "tile"}
    if strange := sorted(settings.keys() - known):
        raise UsageError(f"{file} says {strange[0]!r} of itself, which this version of Gobelin does not know")
    refuse_odd(settings)
    painter = settings.get("model", "")
    if model is None and painter not in ("", SHIPPED):
        raise UsageError(f"{file} was painted by {painter}: give that as --model")
    kept = {name: value for name, value in settings.items() if name != "model"}
    return {"weights": "none", **kept}  # pictures from before there were weights have none


def refuse_others(needed: dict[str, Any], pipeline: Pipeline, file: Path) -> None:
    """Raise :class:`UsageError` where a picture of Gobelin's needs LoRAs or learned words that were not given."""
    for name, option, there in (
        (LORAS, "--lora", pipeline.loras.weights),
        (LEARNED_WORDS, "--inversion", pipeline.learned_words),
    ):
        if needed.get(name, type(there)()) != there:
            raise UsageError(f"{file} was painted with {needed.get(name) or 'none'} as {option}, and not with {there}")


def _weighed(asked: str) -> tuple[Path, float]:
    """A LoRA's file and its weight, 1 where that goes unsaid."""
    name, _, number = asked.rpartition(":")
    try:
        return (Path(name), float(number)) if name and not Path(asked).exists() else (Path(asked), 1.0)
    except ValueError:
        raise UsageError(f"--lora has {asked!r}: give FILE, or FILE:WEIGHT with a number") from None


def opened_picture(file: Path) -> Image.Image:
    """A picture; raises :class:`DataError` for a file that is none."""
    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as a picture: {error}") from error
    return picture


def paint(
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: dict[str, Any],
    on_step: Callable[[PaintingStep], None] = lambda step: None,
) -> Result:
    """Paint, with a progress bar where someone is looking."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        steps = settings.get("steps") or pipeline.recommended.steps
        if settings.get("init_image") is not None:
            steps = int(steps * settings.get("strength", 1))
        task = progress.add_task("painting", total=steps)

        def painted(step: PaintingStep) -> None:
            on_step(step)
            progress.update(task, completed=step.index + 1)

        return pipeline(prompts, on_step=painted, **settings)
