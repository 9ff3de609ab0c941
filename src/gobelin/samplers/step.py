"""The contract of samplers: a denoiser's output, a step, and the noise between steps.

Between steps the latents are variance preserving, z_t = √ᾱ·z_0 + √(1−ᾱ)·ε, as the U-Net sees them. The σ-space of
Karras et al. 2022 (x = z_0 + σ·ε, used by k-diffusion) is the same point divided by √ᾱ, with σ = √((1−ᾱ)/ᾱ).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Generator

from gobelin.attention import AttentionMaps
from gobelin.samplers.noise_levels import NoiseLevels
from gobelin.types import Latents


@dataclass(frozen=True, kw_only=True)
class DenoiserOutput:
    """Noisy latents split into ``denoised`` latents ẑ_0 and ``noise`` ε̂.

    ``latents`` are the noisy latents that were split: a denoiser may move the ones that it is given, and the sampler
    goes on from these. ``maps`` are the attention maps of this call, empty unless a trace was asked for.
    """

    latents: Latents
    denoised: Latents
    noise: Latents
    maps: AttentionMaps = field(default_factory=AttentionMaps)


Denoise = Callable[[Latents, float, float], DenoiserOutput]
"""(noisy_latents, timestep, ᾱ) -> output: a :class:`gobelin.denoiser.Denoiser`, or any such function."""

DrawNoise = Callable[[], Latents]
"""() -> standard noise for the next stochastic step: a :class:`NoiseSource`, or any such function."""

Levels = TypeVar("Levels", bound=NoiseLevels)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a sampler, as it is yielded.

    ``timestep`` and ``sigma`` are where the step started (σ is infinite at zero terminal SNR), and ``noisy_latents``
    those that the denoiser split there; ``latents`` are where it arrived, after the last step the image's; ``denoised``
    are the clean latents that it aimed at. ``maps`` are the attention maps of the step, empty unless a trace was asked
    for.
    """

    index: int
    timestep: float
    sigma: float
    noisy_latents: Latents
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
            noisy_latents=output.latents,
            latents=latents,
            denoised=output.denoised,
            maps=output.maps,
        )


SamplerFunction = Callable[[Denoise, Latents, Levels, DrawNoise], Iterator[Step]]
"""(denoise, start latents, noise levels, draw_noise) -> steps: every sampler's signature."""


class NoiseSource:
    """Standard noise from one CPU generator per image, so that an image does not depend on its neighbours in the batch.

    ``shape`` is that of one image's latents, (channels, h, w); the noise is moved to ``device``.
    """

    def __init__(
        self, generators: Sequence[Generator], shape: tuple[int, int, int], device: torch.device | str = "cpu"
    ):
        self.generators = generators
        self.shape = shape
        self.device = device

    def __call__(self) -> Latents:
        """Draw the next noise [B, channels, h, w], float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def sigma_of(alpha: float) -> float:
    """Compute σ = √((1−ᾱ)/ᾱ), the noise level in σ-space."""
    return math.sqrt((1 - alpha) / alpha)


def ancestral_noise(sigma: float, next_sigma: float) -> float:
    """Compute the σ of the fresh noise at the end of an ancestral step (k-diffusion ``get_ancestral_step``, η = 1)."""
    return math.sqrt(next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2)
