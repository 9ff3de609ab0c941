"""Options of the commands that open models and paint, and painting with a progress bar."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from gobelin.cli.options import SettingsOf
from gobelin.engines import EngineName
from gobelin.errors import UsageError
from gobelin.painting import Painting, PaintingStep, Result
from gobelin.pipeline import SHIPPED, Pipeline
from gobelin.plan import LEARNED_WORDS, LORAS, NOT_REPEATABLE
from gobelin.prompt_weighting import LoraTag, PromptSyntax, extract_lora_tags
from gobelin.schedule import PredictionType
from gobelin.settings import Settings
from gobelin.validation import nearest, refuse_unknown, shown, validated

ADDED = (LORAS, LEARNED_WORDS)
"""Keys of an image's settings that name LoRAs and learned words, which have to be loaded."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of opening a model."""

    group: ClassVar[str] = "model"

    vae: Path | None = None
    """A VAE in place of the model's own: a folder or a file."""
    tokenizer: Path | None = None
    """Folder of a tokenizer, for a model in a single file, which has none."""
    variant: str | None = None
    """Variant of a folder's files, such as fp16."""
    allow_pickle: bool = False
    """Open .ckpt, .bin and .pt files too; only tensors are read from them."""
    ema: bool = False
    """Take the average (EMA) of the U-Net's weights from a single file that has it."""
    prediction_type: PredictionType | None = None
    """What the U-Net predicts, where the model does not say so, or wrongly: the noise, or the velocity."""
    zero_terminal_snr: bool = False
    """The U-Net was trained with zero terminal SNR, where the model does not say so."""

    def files(self) -> dict[str, Any]:
        """Return the options as :func:`gobelin.checkpoint.open_model` takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelOptions)}


@dataclass(frozen=True, kw_only=True)
class PipelineOptions(ModelOptions):
    """Options of opening a model to paint with, and what is added to it."""

    group: ClassVar[str] = "model"

    model: str | None = None
    """Diffusers folder, .safetensors or .ckpt file, or Hub name; without it, the model that comes with Gobelin."""
    lora: tuple[str, ...] = ()
    """LoRAs to load: FILE, or FILE:WEIGHT."""
    lora_dir: Path | None = None
    """Folder in which LoRAs are that prompts ask for as AUTOMATIC1111 writes it: <lora:NAME:WEIGHT>."""
    inversion: tuple[Path, ...] = ()
    """Textual inversions to load; each is called by its file's name, or by the word in it, in any case."""
    device: str | None = None
    """Device: cpu, cuda or mps; without it, or with auto, the fastest there is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision to compute in."""
    engine: EngineName = "eager"
    """Engine that runs the networks."""

    def open(self, tags: Sequence[LoraTag] = ()) -> Pipeline:
        """Open the model, and load what is added to it, ``tags`` of prompts from :attr:`lora_dir` included."""
        tagged = [(self._find_lora(tag.name), tag.weight) for tag in tags]
        dtype = getattr(torch, self.dtype)
        pipeline = Pipeline.from_pretrained(self.model, self.device, dtype, self.engine, **self.files())
        for given in self.lora:
            file, weight = _file_and_weight(given)
            pipeline.load_lora(file, weight, allow_pickle=self.allow_pickle)
        for file, weight in tagged:
            pipeline.load_lora(file, weight)
        for file in self.inversion:
            pipeline.load_textual_inversion(file, allow_pickle=self.allow_pickle)
        return pipeline

    def take_tags(self, prompts: Sequence[str], syntax: PromptSyntax | None) -> tuple[list[str], list[LoraTag]]:
        """Take the tags of LoRAs out of prompts: these without them, and the LoRAs that are to be loaded.

        As in AUTOMATIC1111's web UI, a negative prompt has none. Without ``--lora-dir`` all stays as it is, and so it
        does with the syntax "none". Raises :class:`UsageError` for prompts that ask for different LoRAs, which are the
        whole model's.
        """
        if self.lora_dir is None or syntax == "none":
            return list(prompts), []
        taken = [extract_lora_tags(prompt) for prompt in prompts]
        for prompt, (_, tags) in zip(prompts, taken, strict=True):
            if set(tags) != set(taken[0][1]):
                raise UsageError(
                    f"the prompts {shown(prompts[0])} and {shown(prompt)} ask for different LoRAs, which change the "
                    "whole model: give each the same tags, or paint them one after the other"
                )
        tags = taken[0][1] if taken else ()
        return [prompt for prompt, _ in taken], [tag for tag in tags if tag.weight]

    def _find_lora(self, name: str) -> Path:
        """Find a LoRA's file by its name without suffix, anywhere in the folder: as it is written, or in any case."""
        assert self.lora_dir is not None
        if not self.lora_dir.is_dir():
            raise UsageError(f"--lora-dir is {self.lora_dir}, which is no folder: give the one that LoRAs are in")
        files = sorted(self.lora_dir.rglob("*.safetensors"))
        found = [file for file in files if file.stem == name]
        found = found or [file for file in files if file.stem.lower() == name.lower()]
        if len(found) > 1:
            several = ", ".join(str(file.relative_to(self.lora_dir)) for file in found)
            raise UsageError(f"the LoRA {shown(name)} is in {self.lora_dir} several times: {shown(several)}; keep one")
        if not found:
            there = nearest(name, [file.stem for file in files]) if files else "there is none"
            raise UsageError(f"there is no {shown(f'{name}.safetensors')} in {self.lora_dir}: {there}")
        return found[0]


@dataclass(frozen=True, kw_only=True)
class PaintingOptions(PipelineOptions):
    """Options of painting: the settings of the images that were given, and where to write."""

    out: Path = Path("out")
    """Folder to write to."""
    settings: Annotated[dict[str, Any], SettingsOf(Settings)] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out is {self.out}, which is a file: give a folder to write to")


def settings_of_image(recorded: dict[str, Any], file: Path, model: str | None) -> dict[str, Any]:
    """Check the settings that Gobelin wrote into an image, so that it can be painted again; the prompt is one of them.

    Raises :class:`UsageError` for one that was painted with controls, which its settings do not hold, for settings that
    this version does not know, and where no ``model`` is given for an image of another than Gobelin's own.
    """
    if NOT_REPEATABLE in recorded:
        raise UsageError(
            f"{file} was painted with a control, which an image does not record: take one that was painted without"
        )
    known = [field.name for field in dataclasses.fields(Settings)]
    refuse_unknown(recorded, [*known, *ADDED, "prompt", "model"], what=f"setting in {file}:")
    if "prompt" in recorded:
        validated(f"the prompt in {file}", recorded["prompt"], str)
    painter = recorded.get("model", "")
    if model is None and painter not in ("", SHIPPED):
        raise UsageError(f"{file} was painted by another model, {painter}: give that one as --model")
    return {name: value for name, value in recorded.items() if name != "model"}


def refuse_other_additions(needed: dict[str, Any], pipeline: Pipeline, file: Path) -> None:
    """Raise :class:`UsageError` where an image of Gobelin's needs LoRAs or learned words that were not given."""
    for name, option, there in (
        (LORAS, "--lora", pipeline.loras.weights),
        (LEARNED_WORDS, "--inversion", pipeline.learned_words),
    ):
        if needed.get(name, type(there)()) != there:
            raise UsageError(f"{file} was painted with {needed.get(name) or 'none'} as {option}, and not with {there}")


def paint_with_progress(
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: Settings,
    on_step: Callable[[PaintingStep], None] = lambda step: None,
) -> Result:
    """Paint, with a progress bar where standard error is a terminal."""
    painting: Painting = pipeline.start(prompts, **settings)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("painting", total=len(painting))
        for step in painting:
            on_step(step)
            progress.update(task, completed=step.index + 1)
    return painting.result


def _file_and_weight(given: str) -> tuple[Path, float]:
    """Split FILE:WEIGHT; the weight is 1 where there is none."""
    name, _, number = given.rpartition(":")
    try:
        return (Path(name), float(number)) if name and not Path(given).exists() else (Path(given), 1.0)
    except ValueError:
        raise UsageError(f"--lora has {given!r}: give FILE, or FILE:WEIGHT with a number") from None
