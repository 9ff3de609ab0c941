"""``gobelin generate``: prompts in, PNG files out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gobelin.cli.options import Named, Positional, parse
from gobelin.cli.painting_options import PaintingOptions


@dataclass(frozen=True, kw_only=True)
class Generate(PaintingOptions):
    """Paint images from prompts, and print where they are.

    Some examples:
      gobelin generate "a red circle"
      gobelin generate "a red circle" "a blue ring" --count 4 --seed 7 --out images
      gobelin generate "three green rings" --maps
      gobelin generate "a blue ring" --init-image image.png --strength 0.6 --mask mask.png
      gobelin generate --from image.png --steps 50
      gobelin generate "a castle" --model model.safetensors --lora style.safetensors:0.7 --sampler dpmpp_2m_karras
      gobelin generate "a castle <lora:style:0.7>" --model model.safetensors --lora-dir loras
    """

    prompts: Positional[tuple[str, ...]] = ()
    """One prompt or several, each in quotes; they stand before options that take several values."""
    from_: Annotated[Path | None, Named("from")] = None
    """Image by Gobelin, AUTOMATIC1111, ComfyUI, Fooocus, SwarmUI, InvokeAI, Draw Things or Easy Diffusion: paint with
    its prompt and settings; other options override them."""
    maps: bool = False
    """Also write a sheet beside each image: the heat map of every word."""


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = parse(Generate, "generate", arguments)
    from gobelin.cli.paint_prompts import (
        paint_prompts,  # PyTorch is imported after the options are read: help and mistakes are quick
    )

    paint_prompts(options)
