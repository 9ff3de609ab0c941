"""What the commands that paint share: their options, and painting where someone may be looking."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from gobelin.pipeline import PaintingStep, Pipeline, Result


@dataclass(frozen=True, kw_only=True)
class PaintingOptions:
    """How to paint: what every command that paints can be told."""

    model: Path | None = None
    """A diffusers folder; without one, the model that comes with Gobelin."""
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
    """ddpm, ddim, euler, euler_karras, euler_ancestral, dpmpp_2m or dpmpp_2m_karras."""
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

    def open(self) -> Pipeline:
        """The model that was asked for."""
        return Pipeline.from_pretrained(self.model, self.device, getattr(torch, self.dtype))

    def settings(self) -> dict[str, Any]:
        """The options as :meth:`Pipeline.stream` takes them."""
        return {
            "negative_prompt": self.negative,
            "seed": self.seed,
            "steps": self.steps,
            "guidance": self.guidance,
            "guidance_rescale": self.guidance_rescale,
            "sampler": self.sampler,
            "height": self.height,
            "width": self.width,
        }


def paint(
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: dict[str, Any],
    on_step: Callable[[PaintingStep], None] = lambda step: None,
) -> Result:
    """Paint, with a progress bar where someone is looking."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("painting", total=settings["steps"] or pipeline.recommended.steps)

        def painted(step: PaintingStep) -> None:
            on_step(step)
            progress.update(task, completed=step.index + 1)

        return pipeline(prompts, on_step=painted, **settings)
