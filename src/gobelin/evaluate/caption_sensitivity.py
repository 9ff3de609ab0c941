"""Whether a U-Net hears what captions say: how much worse it predicts when one thing in a caption is wrong.

No picture is painted, so this is quick, and shows what a model begins to hear long before its scores do.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from gobelin.data import SceneDataset
from gobelin.evaluate.retrieval import kind_of
from gobelin.pipeline import Pipeline
from gobelin.scenes import World

RANGES = ((0.1, 0.4), (0.4, 0.7), (0.7, 1.0))  # of the timesteps, from clean to noise
BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Heard:
    """By how much the squared error of the prediction grows with hard negatives of one kind, in a range of timesteps.

    ``rise`` is a fraction of the error with the true captions, and ``margin`` half of its 95 % interval: a word that
    is not heard has a rise of zero.
    """

    kind: str
    first_timestep: int
    last_timestep: int
    rise: float
    margin: float
    n: int


@torch.no_grad()
def listening(pipeline: Pipeline, world: World, count: int = 200) -> list[Heard]:
    """Try up to ``count`` hard negatives of every kind, of held-in scenes of the "dev" split, with the same noise."""
    vae, steps = pipeline.vae, pipeline.schedule.config.num_train_timesteps
    found = []
    for kind, rows in _negatives(world, count).items():
        pixels = torch.from_numpy(np.stack([image for image, _, _ in rows])).permute(0, 3, 1, 2) / 127.5 - 1
        latents = torch.cat([vae.images_to_latents(part.to(vae.device, vae.dtype)) for part in pixels.split(BATCH)])
        captions = ([caption for _, caption, _ in rows], [wrong for _, _, wrong in rows])
        texts = [_embedded(pipeline, texts) for texts in captions]
        for low, high in RANGES:
            first, last = round(low * steps), round(high * steps) - 1
            timesteps = torch.randint(first, last + 1, (len(rows),), generator=Generator().manual_seed(1))
            right, wrong = _errors(pipeline, latents.cpu().float(), timesteps, texts)
            rise = (wrong.mean() / right.mean() - 1).item()
            spread = (wrong - (1 + rise) * right).std() / right.mean()  # of a ratio of means, to first order
            found.append(
                Heard(
                    kind=kind,
                    first_timestep=first,
                    last_timestep=last,
                    rise=rise,
                    margin=1.96 * spread.item() / len(rows) ** 0.5,
                    n=len(rows),
                )
            )
    return found


def _negatives(world: World, count: int) -> dict[str, list[tuple[np.ndarray, str, str]]]:
    """(image, caption, wrong caption) by what is wrong, at most one of a kind from a scene."""
    pairs = SceneDataset(world=world, count=10 * count, split="dev")
    rows: dict[str, list[tuple[np.ndarray, str, str]]] = {}
    for index in range(len(pairs)):
        pair = pairs[index]
        wrong: dict[str, list[str]] = {}
        for negative in pair.negatives:
            wrong.setdefault(kind_of(pair.caption, negative), []).append(negative)
        for kind, texts in wrong.items():
            if len(rows.setdefault(kind, [])) < count:
                rows[kind].append((pair.image, pair.caption, texts[index % len(texts)]))
    return {kind: rows[kind] for kind in sorted(rows) if len(rows[kind]) > 1}


def _embedded(pipeline: Pipeline, texts: list[str]) -> Tensor:
    token_ids = pipeline.tokenizer(texts).to(pipeline.text_encoder.device)
    return torch.cat([pipeline.text_encoder(part) for part in token_ids.split(BATCH)])


def _errors(pipeline: Pipeline, latents: Tensor, timesteps: Tensor, texts: list[Tensor]) -> list[Tensor]:
    """Squared errors of the prediction, means over the latents [N], with each of the text embeddings [N, L, D]."""
    unet, schedule = pipeline.unet, pipeline.schedule
    noise = torch.randn(latents.shape, generator=Generator().manual_seed(0))
    noisy_latents = schedule.add_noise(latents, noise, timesteps).to(unet.device, unet.dtype)
    target = schedule.target(latents, noise, timesteps)
    errors = []
    for text_embeddings in texts:
        given = (noisy_latents, timesteps.to(unet.device), text_embeddings)
        parts = zip(*(tensor.split(BATCH) for tensor in given), strict=True)
        prediction = torch.cat([unet(*part) for part in parts]).float().cpu()
        errors.append((prediction - target).square().mean(dim=(1, 2, 3)))
    return errors
