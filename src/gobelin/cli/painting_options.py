"""Options of the commands that open models and paint; :mod:`gobelin.cli.open_and_paint` does what they say."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from gobelin.cli.options import SettingsOf
from gobelin.engine_names import EngineName
from gobelin.errors import UsageError
from gobelin.prompt_weighting import LoraTag, PromptSyntax, extract_lora_tags
from gobelin.settings import Settings
from gobelin.validation import shown


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
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
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
    """Diffusers folder, .safetensors or .ckpt file, Hub name, or a model that comes with Gobelin: tiny, the one without
    it, or emoji."""
    lora: tuple[str, ...] = ()
    """LoRAs to load: FILE, or FILE:WEIGHT."""
    lora_dir: Path | None = None
    """Folder in which LoRAs are that prompts ask for as AUTOMATIC1111 writes it: <lora:NAME:WEIGHT>."""
    inversion: tuple[Path, ...] = ()
    """Textual inversions to load; each is called by its file's name, or by the word in it, in any case."""
    device: str | None = None
    """Device: cpu, cuda or mps; without it, or with auto, the fastest there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; auto is the fastest for the device: bfloat16 for large models where it multiplies
    that faster, float32 otherwise."""
    engine: EngineName = "eager"
    """Engine that runs the networks."""

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


@dataclass(frozen=True, kw_only=True)
class PaintingOptions(PipelineOptions):
    """Options of painting: the settings of the images that were given, and where to write."""

    out: Path = Path("out")
    """Folder to write to."""
    settings: Annotated[dict[str, Any], SettingsOf(Settings)] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out is {self.out}, which is a file: give a folder to write to")
