"""What every sampler is given and gives: a denoiser's guess, and a step.

Between steps the latents are variance preserving, z_t = √ᾱ·z_0 + √(1−ᾱ)·ε: what the U-Net sees. The σ-space of
Karras et al. 2022 (x = z_0 + σ·ε, used by k-diffusion) is the same point divided by √ᾱ, with σ = √((1−ᾱ)/ᾱ).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from gobelin.attention import AttentionMaps
from gobelin.samplers.noise_levels import NoiseLevels

Latents = Float[Tensor, "batch channels h w"]


@dataclass(frozen=True, kw_only=True)
class DenoiserOutput:
    """What a denoiser sees in noisy latents: the two that they are made of.

    ``latents`` are those that it saw, which may be others than it was given; ``maps`` are what its attentions looked
    at, where that was asked for.
    """

    latents: Latents
    denoised: Latents
    noise: Latents
    maps: AttentionMaps = field(default_factory=dict)


Denoise = Callable[[Tensor, float, float], DenoiserOutput]
"""(noisy_latents, timestep, ᾱ) -> guess: a :class:`gobelin.denoiser.Denoiser`, or any such function."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a sampler yields after each step.

    ``timestep`` and ``sigma`` are those that the step started from; ``latents`` are where it arrived, and after
    the last step they are the picture's; ``denoised`` is the guess at the picture's latents that it used. ``maps``
    are what the attentions looked at then, where that was asked for.
    """

    index: int
    timestep: float
    sigma: float
    latents: Latents
    denoised: Latents
    maps: AttentionMaps

    @staticmethod
    def of(index: int, timestep: float, alpha: float, latents: Latents, output: DenoiserOutput) -> "Step":
        """Make the step from ``timestep`` and noise level ᾱ (``alpha``) to ``latents``, taken by this output."""
        return Step(
            index=index,
            timestep=timestep,
            sigma=sigma_of(alpha) if alpha > 0 else math.inf,
            latents=latents,
            denoised=output.denoised,
            maps=output.maps,
        )


class NoiseSource:
    """Noise from one CPU generator per image, so that an image does not depend on its neighbours in the batch."""

    def __init__(self, generators: Sequence[Generator], shape: tuple[int, int, int], device: Any = "cpu"):
        self.generators = generators
        self.shape = shape
        self.device = device

    def __call__(self) -> Latents:
        """The next standard noise [B, channels, h, w], float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


SamplerFunction = Callable[[Denoise, Tensor, NoiseLevels, Callable[[], Tensor]], Iterator[Step]]


def sigma_of(alpha_cumprod: float) -> float:
    """σ = √((1−ᾱ)/ᾱ)."""
    return math.sqrt((1 - alpha_cumprod) / alpha_cumprod)


def ancestral_noise(sigma: float, target: float) -> float:
    """How much fresh noise an ancestral step from σ to the ``target`` adds at its end (k-diffusion, η = 1)."""
    return math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2)
