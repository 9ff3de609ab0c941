"""Whether a U-Net hears what captions say: how much worse it predicts when one thing in a caption is wrong.

No picture is painted, so this is quick, and shows what a model begins to hear long before its scores do.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from gobelin.data import ScenePairs
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
    found = []
    for kind, rows in _negatives(world, count).items():
        for low, high in RANGES:
            steps = pipeline.schedule.config.num_train_timesteps
            first, last = round(low * steps), round(high * steps) - 1
            generator = Generator().manual_seed(0)
            errors = torch.cat(
                [_errors(pipeline, rows[at : at + BATCH], first, last, generator) for at in range(0, len(rows), BATCH)]
            )
            right = errors[:, 0].mean().item()
            rises = (errors[:, 1] - errors[:, 0]) / right
            margin = 1.96 * rises.std().item() / len(rows) ** 0.5
            found.append(
                Heard(
                    kind=kind,
                    first_timestep=first,
                    last_timestep=last,
                    rise=rises.mean().item(),
                    margin=margin,
                    n=len(rows),
                )
            )
    return found


def _negatives(world: World, count: int) -> dict[str, list[tuple[np.ndarray, str, str]]]:
    """(image, caption, wrong caption) by what is wrong, at most one of a kind from a scene."""
    pairs = ScenePairs(world=world, count=10 * count, split="dev")
    rows: dict[str, list[tuple[np.ndarray, str, str]]] = {}
    for index in range(len(pairs)):
        pair = pairs[index]
        wrong = {kind_of(pair.caption, negative): negative for negative in pair.negatives}
        for kind, negative in wrong.items():
            if len(rows.setdefault(kind, [])) < count:
                rows[kind].append((pair.image, pair.caption, negative))
    return {kind: rows[kind] for kind in sorted(rows) if len(rows[kind]) > 1}


def _errors(
    pipeline: Pipeline, rows: list[tuple[np.ndarray, str, str]], first: int, last: int, generator: Generator
) -> Tensor:
    """Squared errors [rows, 2] with the true and with the wrong captions, means over the latents."""
    unet, vae, schedule = pipeline.unet, pipeline.vae, pipeline.schedule
    pixels = torch.from_numpy(np.stack([image for image, _, _ in rows])).permute(0, 3, 1, 2)
    latents = vae.images_to_latents(pixels.to(vae.device, vae.dtype) / 127.5 - 1).cpu().float()
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(first, last + 1, (len(rows),), generator=generator)
    noisy_latents = schedule.add_noise(latents, noise, timesteps).to(unet.device, unet.dtype)
    target = schedule.target(latents, noise, timesteps).to(unet.device)
    errors = []
    for captions in ([caption for _, caption, _ in rows], [wrong for _, _, wrong in rows]):
        token_ids = pipeline.tokenizer(captions).to(pipeline.text_encoder.device)
        prediction = unet(noisy_latents, timesteps.to(unet.device), pipeline.text_encoder(token_ids))
        errors.append((prediction.float() - target).square().mean(dim=(1, 2, 3)).cpu())
    return torch.stack(errors, dim=1)
