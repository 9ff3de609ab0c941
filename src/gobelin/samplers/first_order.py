"""Samplers that ask once a step and remember nothing."""

import math
from collections.abc import Callable, Iterator

from gobelin.samplers.noise_levels import NoiseLevels
from gobelin.samplers.step import Denoise, Latents, Step, ancestral_noise, sigma_of


def ddim(denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]) -> Iterator[Step]:
    """Denoise, then put the same noise back at the next level (Song et al. 2020, equation 12, η = 0).

    This is also Euler's method on the probability-flow ODE in σ-space (Karras et al. 2022, algorithm 2 without
    churn): x + (σ' − σ)·ε̂ divided by √ᾱ' is the same expression. The two differ in their grids only.
    """
    for index, timestep, here, there in levels.intervals():
        guess = denoise(latents, timestep, here)
        latents = math.sqrt(there) * guess.denoised + math.sqrt(1 - there) * guess.noise
        yield Step.of(index, timestep, here, latents, guess)


def ddpm(denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]) -> Iterator[Step]:
    """Draw from the posterior q(z_t' | z_t, ẑ_0) (Ho et al. 2020, equation 7)."""
    for index, timestep, here, there in levels.intervals():
        guess = denoise(latents, timestep, here)
        alpha = here / there
        mean = (
            math.sqrt(there) * (1 - alpha) / (1 - here) * guess.denoised
            + math.sqrt(alpha) * (1 - there) / (1 - here) * guess.latents
        )
        variance = (1 - there) / (1 - here) * (1 - alpha)
        latents = mean + math.sqrt(variance) * noise() if variance > 0 else mean
        yield Step.of(index, timestep, here, latents, guess)


def euler_ancestral(
    denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]
) -> Iterator[Step]:
    """An Euler step below the next level, then fresh noise up to it (k-diffusion ``sample_euler_ancestral``)."""
    for index, timestep, here, there in levels.intervals():
        guess = denoise(latents, timestep, here)
        sigma, next_sigma = sigma_of(here), sigma_of(there)
        up = ancestral_noise(sigma, next_sigma)
        down = math.sqrt(next_sigma**2 - up**2)
        latents = guess.denoised + down * guess.noise
        if up > 0:
            latents = latents + up * noise()
        latents = math.sqrt(there) * latents
        yield Step.of(index, timestep, here, latents, guess)


_LCM_SPREAD, _LCM_SCALING = 0.5, 10.0  # the data's standard deviation, and how far apart timesteps stand for it


def lcm(denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]) -> Iterator[Step]:
    """Guess the picture, then fresh noise at the next level (Luo et al. 2023, arXiv 2310.04378, algorithm 3)."""
    last = len(levels.timesteps) - 1
    for index, timestep, here, there in levels.intervals():
        guess = denoise(latents, timestep, here)
        scaled = timestep * _LCM_SCALING
        skip = _LCM_SPREAD**2 / (scaled**2 + _LCM_SPREAD**2)
        out = scaled / math.sqrt(scaled**2 + _LCM_SPREAD**2)
        latents = out * guess.denoised + skip * guess.latents
        if index < last:
            latents = math.sqrt(there) * latents + math.sqrt(1 - there) * noise()
        yield Step.of(index, timestep, here, latents, guess)
