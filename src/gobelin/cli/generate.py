"""``gobelin generate``: prompts in, PNG files out."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress
from tyro.conf import Positional

from gobelin.cli.options import parse
from gobelin.errors import UsageError
from gobelin.pipeline import Pipeline, Result


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Paint pictures from prompts, and print where they are.

    Some examples:
      gobelin generate "a red circle"
      gobelin generate "a red circle" "a blue ring" --count 4 --seed 7 --out pictures
      gobelin generate "a castle" --model path/to/a/diffusers/folder --sampler dpmpp_2m_karras --steps 25
    """

    prompts: Positional[tuple[str, ...]]
    """What to paint: one prompt or several, each in quotes."""
    model: Path | None = None
    """A diffusers folder; without one, the model that comes with Gobelin."""
    out: Path = Path("out")
    """Where the pictures go."""
    seed: int | None = None
    """The first picture's; without one it is drawn, and kept in the picture."""
    steps: int | None = None
    """How many denoising steps; without it, what the model recommends, as for the next three."""
    guidance: float | None = None
    """How hard to follow the prompt; 1 is not at all harder than the data."""
    guidance_rescale: float | None = None
    """0 to 1: take back the contrast that guidance adds."""
    sampler: str | None = None
    """ddpm, ddim, euler, euler_karras, euler_ancestral, dpmpp_2m or dpmpp_2m_karras."""
    count: int = 1
    """Pictures for each prompt."""
    negative: str = ""
    """What to steer away from."""
    height: int | None = None
    """In pixels; without it, the model's own."""
    width: int | None = None
    """In pixels; without it, the model's own."""
    device: str | None = None
    """cpu, cuda or mps; without it, or with auto, the best there is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision to compute in."""


def run(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(Generate, "generate", arguments)
    if not options.prompts:
        raise UsageError('no prompt given: say what to paint, as in gobelin generate "a red circle"')
    pipeline = Pipeline.from_pretrained(options.model, options.device, getattr(torch, options.dtype))
    result = paint(pipeline, options)
    for path in result.save(options.out):
        print(path)


def paint(pipeline: Pipeline, options: Generate) -> Result:
    """Paint with a progress bar where someone is looking."""
    asked = {
        "negative_prompt": options.negative,
        "seed": options.seed,
        "steps": options.steps,
        "guidance": options.guidance,
        "guidance_rescale": options.guidance_rescale,
        "sampler": options.sampler,
        "height": options.height,
        "width": options.width,
        "count": options.count,
    }
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("painting", total=options.steps or pipeline.recommended.steps)
        return pipeline(options.prompts, on_step=lambda step: progress.update(task, completed=step.index + 1), **asked)
