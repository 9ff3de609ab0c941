"""Samplers of first order: one call of the denoiser a step, and no memory of the steps before."""

import math
from collections.abc import Iterator

from gobelin.samplers.noise_levels import NoiseLevels
from gobelin.samplers.step import Denoise, DrawNoise, Latents, Step, ancestral_noise, sigma_of


def ddim(denoise: Denoise, latents: Latents, levels: NoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """DDIM: denoise, then put the same noise back at the next level (Song et al. 2020, equation 12, η = 0).

    This is also Euler's method on the probability-flow ODE in σ-space (Karras et al. 2022, algorithm 2 without
    churn): x + (σ' − σ)·ε̂ divided by √ᾱ' is the same expression. The two differ in their noise levels only.
    """
    for index, timestep, alpha, next_alpha in levels.intervals():
        output = denoise(latents, timestep, alpha)
        latents = math.sqrt(next_alpha) * output.denoised + math.sqrt(1 - next_alpha) * output.noise
        yield Step.of(index, timestep, alpha, latents, output)


def ddpm(denoise: Denoise, latents: Latents, levels: NoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """DDPM: draw from the posterior q(z_t' | z_t, ẑ_0) (Ho et al. 2020, equation 7)."""
    for index, timestep, alpha, next_alpha in levels.intervals():
        output = denoise(latents, timestep, alpha)
        alpha_t = alpha / next_alpha
        mean = (
            math.sqrt(next_alpha) * (1 - alpha_t) / (1 - alpha) * output.denoised
            + math.sqrt(alpha_t) * (1 - next_alpha) / (1 - alpha) * output.latents
        )
        variance = (1 - next_alpha) / (1 - alpha) * (1 - alpha_t)
        latents = mean + math.sqrt(variance) * draw_noise() if variance > 0 else mean
        yield Step.of(index, timestep, alpha, latents, output)


def euler_ancestral(denoise: Denoise, latents: Latents, levels: NoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """Ancestral Euler: a step below the next level, then fresh noise up to it (k-diffusion)."""
    for index, timestep, alpha, next_alpha in levels.intervals():
        output = denoise(latents, timestep, alpha)
        sigma, next_sigma = sigma_of(alpha), sigma_of(next_alpha)
        sigma_up = ancestral_noise(sigma, next_sigma)
        sigma_down = math.sqrt(next_sigma**2 - sigma_up**2)
        latents = output.denoised + sigma_down * output.noise
        if sigma_up > 0:
            latents = latents + sigma_up * draw_noise()
        latents = math.sqrt(next_alpha) * latents
        yield Step.of(index, timestep, alpha, latents, output)


# The consistency model's boundary condition, c_skip(t) and c_out(t), has the constants that latent consistency models
# are distilled with (arXiv 2310.04378 and its code; diffusers' LCMScheduler).
_LCM_SIGMA_DATA = 0.5
_LCM_TIMESTEP_SCALING = 10.0


def lcm(denoise: Denoise, latents: Latents, levels: NoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """LCM: denoise by the consistency function, then fresh noise at the next level (arXiv 2310.04378, algorithm 3)."""
    last = len(levels.timesteps) - 1
    for index, timestep, alpha, next_alpha in levels.intervals():
        output = denoise(latents, timestep, alpha)
        scaled = timestep * _LCM_TIMESTEP_SCALING
        c_skip = _LCM_SIGMA_DATA**2 / (scaled**2 + _LCM_SIGMA_DATA**2)
        c_out = scaled / math.sqrt(scaled**2 + _LCM_SIGMA_DATA**2)
        latents = c_out * output.denoised + c_skip * output.latents
        if index < last:
            latents = math.sqrt(next_alpha) * latents + math.sqrt(1 - next_alpha) * draw_noise()
        yield Step.of(index, timestep, alpha, latents, output)
