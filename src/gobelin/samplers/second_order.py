"""Samplers of second order that ask twice a step; the last step, to no noise at all, is of first order."""

import math
from collections.abc import Callable, Iterator

from gobelin.samplers.noise_levels import NoiseLevels
from gobelin.samplers.step import Denoise, Latents, Step, ancestral_noise, sigma_of


def heun(denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]) -> Iterator[Step]:
    """Heun's method: the mean of the slopes at both ends (Karras et al. 2022, algorithm 1)."""
    for index, timestep, here, there in levels.intervals():
        guess = denoise(latents, timestep, here)
        start, stride = guess.latents / math.sqrt(here), sigma_of(there) - sigma_of(here)
        slope = guess.noise
        if there < 1:
            arrived = math.sqrt(there) * (start + stride * slope)
            slope = (slope + denoise(arrived, levels.timesteps[index + 1], there).noise) / 2
        latents = math.sqrt(there) * (start + stride * slope)
        yield Step.of(index, timestep, here, latents, guess)


def dpm_2(denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]) -> Iterator[Step]:
    """The slope halfway, in log σ (Karras et al. 2022, algorithm 2 without churn; k-diffusion ``sample_dpm_2``)."""
    yield from _midway(denoise, latents, levels, None)


def dpm_2_ancestral(
    denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]
) -> Iterator[Step]:
    """The same to below the next level, then fresh noise up to it (k-diffusion ``sample_dpm_2_ancestral``)."""
    yield from _midway(denoise, latents, levels, noise)


def _midway(
    denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents] | None
) -> Iterator[Step]:
    for index, timestep, here, there in levels.intervals():
        guess = denoise(latents, timestep, here)
        sigma, target = sigma_of(here), sigma_of(there)
        up = 0.0 if noise is None else ancestral_noise(sigma, target)
        down = math.sqrt(target**2 - up**2)
        start, slope = guess.latents / math.sqrt(here), guess.noise
        if there < 1:
            middle = math.sqrt(sigma * down)
            alpha_cumprod = 1 / (1 + middle**2)
            halfway = math.sqrt(alpha_cumprod) * (start + (middle - sigma) * slope)
            slope = denoise(halfway, levels.timestep_of(middle), alpha_cumprod).noise
        arrived = start + (down - sigma) * slope
        if noise is not None and up > 0:
            arrived = arrived + up * noise()
        latents = math.sqrt(there) * arrived
        yield Step.of(index, timestep, here, latents, guess)
