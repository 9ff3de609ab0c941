"""Samplers of second order: two calls of the denoiser a step, except for the last, to no noise at all."""

import math
from collections.abc import Iterator

from gobelin.samplers.noise_levels import DPM2NoiseLevels, NoiseLevels
from gobelin.samplers.step import Denoise, DrawNoise, Latents, Step, ancestral_noise, sigma_of


def heun(denoise: Denoise, latents: Latents, levels: NoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """Heun's method: the mean of the slopes at both ends (Karras et al. 2022, algorithm 1)."""
    for index, timestep, alpha, next_alpha in levels.intervals():
        output = denoise(latents, timestep, alpha)
        start, stride = output.latents / math.sqrt(alpha), sigma_of(next_alpha) - sigma_of(alpha)
        slope = output.noise
        if next_alpha < 1:
            end = math.sqrt(next_alpha) * (start + stride * slope)
            slope = (slope + denoise(end, levels.timesteps[index + 1], next_alpha).noise) / 2
        latents = math.sqrt(next_alpha) * (start + stride * slope)
        yield Step.of(index, timestep, alpha, latents, output)


def dpm_2(denoise: Denoise, latents: Latents, levels: DPM2NoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """DPM2: the slope halfway in log σ (Karras et al. 2022, algorithm 2 without churn; k-diffusion)."""
    yield from _dpm_2(denoise, latents, levels, None)


def dpm_2_ancestral(
    denoise: Denoise, latents: Latents, levels: DPM2NoiseLevels, draw_noise: DrawNoise
) -> Iterator[Step]:
    """Ancestral DPM2: a step below the next level, then fresh noise up to it (k-diffusion)."""
    yield from _dpm_2(denoise, latents, levels, draw_noise)


def _dpm_2(denoise: Denoise, latents: Latents, levels: DPM2NoiseLevels, draw_noise: DrawNoise | None) -> Iterator[Step]:
    """Step through DPM2, ancestral where there is noise to draw."""
    for index, timestep, alpha, next_alpha in levels.intervals():
        output = denoise(latents, timestep, alpha)
        sigma, next_sigma = sigma_of(alpha), sigma_of(next_alpha)
        sigma_up = 0.0 if draw_noise is None else ancestral_noise(sigma, next_sigma)
        sigma_down = math.sqrt(next_sigma**2 - sigma_up**2)
        start, slope = output.latents / math.sqrt(alpha), output.noise
        if next_alpha < 1:
            sigma_mid = math.sqrt(sigma * sigma_down)
            alpha_mid = 1 / (1 + sigma_mid**2)
            middle = math.sqrt(alpha_mid) * (start + (sigma_mid - sigma) * slope)
            slope = denoise(middle, levels.timestep_of(sigma_mid), alpha_mid).noise
        end = start + (sigma_down - sigma) * slope
        if draw_noise is not None and sigma_up > 0:
            end = end + sigma_up * draw_noise()
        latents = math.sqrt(next_alpha) * end
        yield Step.of(index, timestep, alpha, latents, output)
