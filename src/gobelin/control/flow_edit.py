"""FlowEdit: from a finished image to a changed one, without going back to noise."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from gobelin.control.batch import Attached, Batch, RowPair
from gobelin.denoiser import ComposableDenoiser
from gobelin.errors import UsageError
from gobelin.guidance import Guidance, Predictions
from gobelin.samplers import Denoise, NoiseLevels, Step, img2img_levels
from gobelin.samplers.noise_levels import euler_levels
from gobelin.schedule import NoiseSchedule
from gobelin.types import Latents
from gobelin.validation import validate_fields, validated


@dataclass(frozen=True, kw_only=True)
class FlowEdit:
    """FlowEdit: change finished images in place of painting from noise (:func:`flow_edit`).

    ``latents`` are the images'. The batch has twice as many rows: first the images as they are, each with a prompt that
    describes it, then what becomes of each, with the changed prompt. The share ``strength`` of the way from noise to
    image is taken, its end: less changes less. A ``gain`` of 0 is the paper's method.
    """

    latents: Float[Tensor, "images channels h w"] = field(repr=False)
    strength: Annotated[float, Interval(gt=0, le=1)] = 1.0
    gain: float = 0.45  # what a prediction forgets under noise (docs/decisions.md, "An edit carries the difference")

    def __post_init__(self) -> None:
        validate_fields(self, but=("latents",))
        validated("latents", self.latents, Annotated[Tensor, "a tensor [images, channels, h, w]"])

    def attach(self, batch: Batch) -> Attached:
        """Take the place of the sampler; raises :class:`UsageError` for latents of another number or size."""
        wanted = (len(batch) / 2, batch.channels, *batch.latent_size)
        if tuple(self.latents.shape) != wanted:
            raise UsageError(
                f"{list(self.latents.shape)} are edited in a batch of {len(batch)}: expected half as many images, each "
                f"{list(wanted[1:])}"
            )
        return Attached(sampling=self)

    def levels(self, schedule: NoiseSchedule, steps: int) -> NoiseLevels:
        """Space noise levels evenly from the last timestep on, down to no noise; the end of them by ``strength``."""
        return img2img_levels(euler_levels(schedule, steps, "trailing", karras=False), steps, self.strength)

    def steps(
        self, denoise: ComposableDenoiser, levels: NoiseLevels, start_noise: Latents, noise: Callable[[], Latents]
    ) -> Iterator[Step]:
        """Edit the images, step by step; nothing starts from noise."""
        latents = self.latents.to(start_noise.device, torch.float32).repeat(2, 1, 1, 1)
        return flow_edit(denoise, latents, levels, noise, self.gain)


@dataclass(frozen=True, kw_only=True)
class EditGuidance:
    """Edit guidance: push image ``rows[1]`` from the words of ``rows[0]`` to its own.

    Classifier-free guidance goes from no words to a prompt; this adds ``strength`` times the way from the other prompt
    to this one: what *differs* in the prompt grows. It costs a pass of the U-Net a step, for that image alone.
    """

    strength: float = 2.0
    rows: RowPair = (0, 1)

    def __post_init__(self) -> None:
        validate_fields(self)

    def attach(self, batch: Batch) -> Attached:
        """Wrap the guidance."""
        first, second = batch.rows(self.rows)
        target, source = slice(second, second + 1), slice(first, first + 1)

        def around(guidance: Guidance) -> Guidance:
            def guide(predictions: Predictions) -> Latents:
                guided = guidance(predictions).clone()
                before = predictions.predict(predictions.network.positive.rows(source), rows=target)
                guided[target] += self.strength * (predictions.positive()[target] - before)
                return guided

            return guide

        return Attached(guide=around)


def flow_edit(
    denoise: Denoise,
    latents: Latents,
    levels: NoiseLevels,
    noise: Callable[[], Latents],
    gain: float = 0.0,
) -> Iterator[Step]:
    """FlowEdit (Kulikov et al. 2024, arXiv 2412.08629, algorithm 1, n_avg = 1), at a diffusion's noise levels.

    The first half of ``latents`` are finished images, which stay as they are, and the second half what becomes of them.
    At each level both are put under the same fresh noise, and their *difference* δ goes an Euler step in σ towards the
    difference Δ of the two denoised ones: δ' = σ'/σ · δ + (1 − σ'/σ) · (1 + gain · (1 − ᾱ)) · Δ. What the two prompts
    agree on takes no part in it. The ``gain`` is ours: under noise the denoiser sees only a part of what has changed
    already, and so Δ falls short of it. The steps' ``latents`` are images without noise.
    """
    source, target = latents.chunk(2)
    for index, timestep, alpha, next_alpha in levels.intervals():
        signal = math.sqrt(alpha)
        fresh = noise().chunk(2)[0]
        clean = torch.cat([source, target])
        output = denoise(signal * clean + math.sqrt(1 - alpha) * fresh.repeat(2, 1, 1, 1), timestep, alpha)
        source_seen, target_seen = output.latents.chunk(2)
        source_denoised, target_denoised = output.denoised.chunk(2)
        left = math.sqrt((1 - next_alpha) / next_alpha * alpha / (1 - alpha))
        gained = 1 + gain * (1 - alpha)
        target = (
            source
            + left * (target_seen - source_seen) / signal
            + (1 - left) * gained * (target_denoised - source_denoised)
        )
        yield Step.of(index, timestep, alpha, torch.cat([source, target]), output)
