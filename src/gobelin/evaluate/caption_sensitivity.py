"""Caption sensitivity: the rise of a U-Net's prediction error when one thing in a caption is wrong.

No image is generated, so this is quick, and it shows what a model begins to use long before its scores do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from gobelin.data import SceneDataset
from gobelin.evaluate.measurement_report import ReportTable
from gobelin.evaluate.retrieval import negative_kind
from gobelin.images import images_to_tensor
from gobelin.pipeline import Pipeline
from gobelin.scenes import World

_RANGES = ((0.1, 0.4), (0.4, 0.7), (0.7, 1.0))  # of the timesteps, from clean to noise
_BATCH_SIZE = 50


@dataclass(frozen=True, kw_only=True)
class CaptionSensitivity:
    """The rise of the prediction's squared error with hard negatives of one kind, in a range of timesteps.

    ``rise`` is a fraction of the error with the true captions, and ``margin`` half of its 95 % interval: a word that
    the U-Net ignores has a rise of zero. ``n`` counts the captions.
    """

    kind: str
    first_timestep: int
    last_timestep: int
    rise: float
    margin: float
    n: int


@torch.no_grad()
def caption_sensitivity(pipeline: Pipeline, world: World, count: int = 200) -> list[CaptionSensitivity]:
    """Compare errors with up to ``count`` hard negatives of every kind, on held-in "dev" scenes, under equal noise."""
    vae, steps = pipeline.vae, pipeline.schedule.config.num_train_timesteps
    found = []
    for kind, rows in _negatives(world, count).items():
        pixels = images_to_tensor(np.stack([image for image, _, _ in rows]))
        latents = torch.cat(
            [vae.images_to_latents(part.to(vae.device, vae.dtype)) for part in pixels.split(_BATCH_SIZE)]
        )
        captions = ([caption for _, caption, _ in rows], [wrong for _, _, wrong in rows])
        texts = [_embed(pipeline, texts) for texts in captions]
        for low, high in _RANGES:
            first, last = round(low * steps), round(high * steps) - 1
            timesteps = torch.randint(first, last + 1, (len(rows),), generator=Generator().manual_seed(1))
            right, wrong = _errors(pipeline, latents.cpu().float(), timesteps, texts)
            rise = (wrong.mean() / right.mean() - 1).item()
            spread = (wrong - (1 + rise) * right).std() / right.mean()  # of a ratio of means, to first order
            found.append(
                CaptionSensitivity(
                    kind=kind,
                    first_timestep=first,
                    last_timestep=last,
                    rise=rise,
                    margin=1.96 * spread.item() / len(rows) ** 0.5,
                    n=len(rows),
                )
            )
    return found


def caption_sensitivity_tables(content: Sequence[dict[str, Any]]) -> list[ReportTable]:
    """Lay out a list of :class:`CaptionSensitivity` from JSON; no table for an empty one."""
    if not content:
        return []
    ranges = list(dict.fromkeys((one["first_timestep"], one["last_timestep"]) for one in content))
    cells = {(one["kind"], one["first_timestep"]): f"{one['rise']:+.2%} ± {one['margin']:.2%}" for one in content}
    numbers = {one["kind"]: one["n"] for one in content}
    return [
        ReportTable(
            title="Caption sensitivity: how much worse the U-Net predicts with a wrong caption",
            columns=("mistake", *(f"timesteps {first} to {last}" for first, last in ranges), "of"),
            rows=[
                (kind, *(cells[kind, first] for first, _ in ranges), f"{number:,} captions")
                for kind, number in numbers.items()
            ],
            note="The rise of its squared error on scenes of the dev split, same noise: zero for ignored words.",
        )
    ]


def _negatives(world: World, count: int) -> dict[str, list[tuple[np.ndarray, str, str]]]:
    """Collect (image, caption, wrong caption) by kind of mistake, at most one of a kind from a scene."""
    pairs = SceneDataset(world=world, count=10 * count, split="dev")
    rows: dict[str, list[tuple[np.ndarray, str, str]]] = {}
    for index in range(len(pairs)):
        pair = pairs[index]
        wrong: dict[str, list[str]] = {}
        for negative in pair.negatives:
            wrong.setdefault(negative_kind(pair.caption, negative), []).append(negative)
        for kind, texts in wrong.items():
            if len(rows.setdefault(kind, [])) < count:
                rows[kind].append((pair.image, pair.caption, texts[index % len(texts)]))
    return {kind: rows[kind] for kind in sorted(rows) if len(rows[kind]) > 1}


def _embed(pipeline: Pipeline, texts: list[str]) -> Tensor:
    """Embed texts of one chunk each: [N, L, D]."""
    token_ids = pipeline.tokenizer(texts).to(pipeline.text_encoder.device)
    return torch.cat([pipeline.text_encoder(part) for part in token_ids.split(_BATCH_SIZE)])


def _errors(pipeline: Pipeline, latents: Tensor, timesteps: Tensor, texts: list[Tensor]) -> list[Tensor]:
    """Compute the prediction's mean squared errors [N] with each of the text embeddings [N, L, D]."""
    unet, schedule = pipeline.unet, pipeline.schedule
    noise = torch.randn(latents.shape, generator=Generator().manual_seed(0))
    noisy_latents = schedule.add_noise(latents, noise, timesteps).to(unet.device, unet.dtype)
    target = schedule.target(latents, noise, timesteps)
    errors = []
    for text_embeddings in texts:
        given = (noisy_latents, timesteps.to(unet.device), text_embeddings)
        parts = zip(*(tensor.split(_BATCH_SIZE) for tensor in given), strict=True)
        prediction = torch.cat([unet(*part) for part in parts]).float().cpu()
        errors.append((prediction - target).square().mean(dim=(1, 2, 3)))
    return errors
