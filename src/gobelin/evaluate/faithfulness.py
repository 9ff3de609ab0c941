"""How faithfully a model paints what it is told: scene prompts, painted, graded, counted.

The tasks are in the manner of GenEval (Ghosh et al. 2023, arXiv 2310.11513), on a world whose truth is known; the
numbers are not comparable with GenEval's own.
"""

import math
import random
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from gobelin.data import ScenePairs
from gobelin.pipeline import Pipeline, to_pil
from gobelin.scenes import TASKS, Prompt, Sample, Seen, Verdict, World, grade, judge, prompts
from gobelin.vae import VAE

BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of ``n`` trials with its 95 % interval (Wilson 1927)."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> "Share":
        """The share of True."""
        n, hits, z = len(outcomes), sum(outcomes), 1.959964
        if not n:
            return cls(value=math.nan, low=math.nan, high=math.nan, n=0)
        centre = (hits + z * z / 2) / (n + z * z)
        half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
        value = hits / n  # the clamps are for rounding, at shares of 0 and 1
        return cls(value=value, low=max(0.0, min(value, centre - half)), high=min(1.0, max(value, centre + half)), n=n)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What was right in a task's pictures; see :class:`gobelin.scenes.Verdict` for what each word means."""

    task: str
    split: str
    correct: Share
    colour: Share
    shape: Share
    exact: Share

    @classmethod
    def of(cls, task: str, split: str, verdicts: Sequence[Verdict]) -> "TaskScore":
        """The shares of what was right."""
        return cls(
            task=task,
            split=split,
            correct=Share.of([verdict.correct for verdict in verdicts]),
            colour=Share.of([verdict.colour for verdict in verdicts]),
            shape=Share.of([verdict.shape for verdict in verdicts]),
            exact=Share.of([verdict.exact for verdict in verdicts]),
        )


@dataclass(frozen=True, kw_only=True)
class Painted:
    """A picture painted for a prompt, what the grader saw in it, and the verdict."""

    prompt: Prompt
    split: str
    image: Image.Image
    seen: list[Seen]
    verdict: Verdict


def score(
    pipeline: Pipeline,
    world: World,
    tasks: Sequence[str] = tuple(TASKS),
    splits: Sequence[str] = ("dev", "heldout"),
    limit: int = 100,
    count: int = 1,
    advance: Callable[[int], None] = lambda painted: None,
) -> tuple[list[TaskScore], list[Painted]]:
    """Paint ``limit`` prompts of each task and split, ``count`` pictures each, and judge them.

    ``advance`` hears how many pictures were painted after every batch, for a progress bar.
    """
    scores, pictures = [], []
    for split in splits:
        for task in tasks:
            asked = [prompt for prompt in prompts(world, task, split, limit) for _ in range(count)]
            painted = []
            for prompt, image in zip(asked, paint(pipeline, [p.text for p in asked], advance), strict=True):
                seen = grade(image, world)
                verdict = judge(prompt, seen)
                painted.append(Painted(prompt=prompt, split=split, image=image, seen=seen, verdict=verdict))
            scores.append(TaskScore.of(task, split, [picture.verdict for picture in painted]))
            pictures += painted
    return scores, pictures


def shuffled(pictures: Sequence[Painted]) -> list[TaskScore]:
    """The same pictures judged by other prompts of their task and split: chance, for this painter and grader."""
    scores = []
    for (task, split), chosen in _by_task(pictures).items():
        ring = random.Random(0).sample(chosen, len(chosen))  # each judged by its neighbour's prompt, none by its own
        verdicts = [judge(ring[at - 1].prompt, picture.seen) for at, picture in enumerate(ring)]
        scores.append(TaskScore.of(task, f"{split}, shuffled", verdicts))
    return scores


def chance(pictures: Sequence[Painted]) -> dict[str, float]:
    """How often one prompt asks for just what another does: what a perfect painter scores when shuffled."""
    shares = {}
    for (task, split), chosen in _by_task(pictures).items():
        asked = Counter((picture.prompt.objects, picture.prompt.relation) for picture in chosen)
        n = len(chosen)
        shares[f"{task}, {split}"] = sum(count * (count - 1) for count in asked.values()) / max(1, n * (n - 1))
    return shares


def paint(
    pipeline: Pipeline, texts: Sequence[str], advance: Callable[[int], None] = lambda painted: None
) -> Iterator[Image.Image]:
    """Pictures of prompts in batches; picture number i has the seed i, whatever the batches."""
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        yield from pipeline(batch, seed=start).images
        advance(len(batch))


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """The grader's own score, and the VAE's, on scenes whose truth is known: all objects, and nothing else, found.

    ``psnr`` is of VAE round trips, in dB, the mean over images.
    """

    renders: Share
    round_trips: Share
    psnr: float
    blurred: dict[str, float]
    noisy: dict[str, float]


def check_instruments(vae: VAE, world: World, count: int = 200, split: str = "dev") -> Instruments:
    """Grade true renders, VAE round trips, and renders blurred and drowned in noise (which must score less)."""
    pairs = ScenePairs(world=world, count=count, split=split)
    samples = [pairs.sample(index) for index in range(count)]
    images = np.stack([sample.image for sample in samples])
    decoded = np.stack([np.asarray(image) for image in round_trip(vae, images)])

    def right(pictures: np.ndarray) -> list[bool]:
        return [_finds(sample, picture, world) for sample, picture in zip(samples, pictures, strict=True)]

    rng = np.random.default_rng(0)
    blurred = {
        f"{sigma:g} px": ndimage.gaussian_filter(images.astype(float), (0, sigma, sigma, 0)) for sigma in (1, 2, 4)
    }
    noisy = {f"{sigma:g}": images + rng.normal(0, 255 * sigma, images.shape) for sigma in (0.05, 0.1, 0.2)}
    as_pixels = {name: _pixels(values) for name, values in {**blurred, **noisy}.items()}
    return Instruments(
        renders=Share.of(right(images)),
        round_trips=Share.of(right(decoded)),
        psnr=psnr(images, decoded),
        blurred={name: Share.of(right(as_pixels[name])).value for name in blurred},
        noisy={name: Share.of(right(as_pixels[name])).value for name in noisy},
    )


@torch.no_grad()
def round_trip(vae: VAE, images: np.ndarray) -> list[Image.Image]:
    """uint8 images [N, H, W, 3] through the VAE and back."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    batches = [vae.latents_to_images(vae.images_to_latents(batch)) for batch in tensor.split(BATCH)]
    return to_pil(torch.cat(batches))


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Peak signal to noise ratio of uint8 images [N, H, W, 3], in dB, averaged over images."""
    errors = np.square(images.astype(float) - others.astype(float)).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-9))))


def report(scores: Sequence[TaskScore], pictures: Sequence[Painted], instruments: Instruments) -> dict[str, Any]:
    """Everything that was measured, as JSON."""
    return {
        "scores": [asdict(score) for score in scores],
        "shuffled": [asdict(score) for score in shuffled(pictures)],
        "chance": chance(pictures),
        "instruments": asdict(instruments),
    }


def _by_task(pictures: Sequence[Painted]) -> dict[tuple[str, str], list[Painted]]:
    groups: dict[tuple[str, str], list[Painted]] = {}
    for picture in pictures:
        groups.setdefault((picture.prompt.task, picture.split), []).append(picture)
    return groups


def _finds(sample: Sample, picture: np.ndarray, world: World) -> bool:
    """Whether the grader sees exactly the scene's objects, and its relation where it has one."""
    scene = sample.scene
    wanted = tuple((thing.shape, thing.colour) for thing in scene.objects)
    prompt = Prompt(text=sample.caption, task="truth", objects=wanted, relation=scene.relation)
    return judge(prompt, grade(picture, world)).exact


def _pixels(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


def contact_sheet(pictures: Sequence[Painted], columns: int = 10) -> Image.Image:
    """Every picture above its prompt, the wrong ones framed in red."""
    cell, text = 2 * pictures[0].image.width, 40
    font = ImageFont.load_default(11)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + 12) + 12, rows * (cell + text + 12) + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        x, y = 12 + index % columns * (cell + 12), 12 + index // columns * (cell + text + 12)
        if not picture.verdict.correct:
            draw.rectangle((x - 4, y - 4, x + cell + 3, y + cell + 3), fill="#d62728")
        sheet.paste(picture.image.resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        lines = textwrap.wrap(picture.prompt.text, width=22)[:3]
        draw.multiline_text((x, y + cell + 4), "\n".join(lines), fill="#333333", font=font, spacing=1)
    return sheet
