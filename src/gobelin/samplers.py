"""From noise to latents: each sampler one generator function over one contract.

Between steps the latents are variance preserving, z_t = √ᾱ·z_0 + √(1−ᾱ)·ε: what the U-Net sees. The σ-space of
Karras et al. 2022 (x = z_0 + σ·ε, used by k-diffusion) is the same point divided by √ᾱ, with σ = √((1−ᾱ)/ᾱ).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from gobelin.attention import AttentionMaps
from gobelin.errors import UsageError
from gobelin.schedule import TINY_ALPHA_CUMPROD, NoiseSchedule, Spacing

Latents = Float[Tensor, "batch channels h w"]


@dataclass(frozen=True, kw_only=True)
class Guess:
    """What a denoiser sees in noisy latents: the two that they are made of.

    ``latents`` are those that it saw, which may be others than it was given; ``maps`` are what its attentions looked
    at, where that was asked for.
    """

    latents: Latents
    denoised: Latents
    noise: Latents
    maps: AttentionMaps = field(default_factory=dict)


Denoise = Callable[[Tensor, float, float], Guess]
"""(noisy_latents, timestep, ᾱ) -> guess: a :class:`gobelin.denoiser.Denoiser`, or any such function."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The noise levels that a sampler visits: step i goes from ``alphas_cumprod[i]`` to ``next_alphas_cumprod[i]``.

    ``start_scale`` is what standard noise is multiplied by to stand at the first level.
    """

    timesteps: list[float]
    alphas_cumprod: list[float]
    next_alphas_cumprod: list[float]
    start_scale: float = 1.0

    def levels(self) -> Iterator[tuple[int, float, float, float]]:
        """(index, timestep, ᾱ from, ᾱ to) of each step."""
        rows = zip(self.timesteps, self.alphas_cumprod, self.next_alphas_cumprod, strict=True)
        return ((index, *row) for index, row in enumerate(rows))


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


class NoiseSource:
    """Noise from one CPU generator per image, so that an image does not depend on its neighbours in the batch."""

    def __init__(self, generators: Sequence[Generator], shape: tuple[int, int, int], device: Any = "cpu"):
        self.generators = generators
        self.shape = shape
        self.device = device

    def __call__(self) -> Latents:
        """The next standard noise [B, channels, h, w], float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


SamplerFunction = Callable[[Denoise, Tensor, Grid, Callable[[], Tensor]], Iterator[Step]]


def ddim(denoise: Denoise, latents: Latents, grid: Grid, noise: Callable[[], Latents]) -> Iterator[Step]:
    """Denoise, then put the same noise back at the next level (Song et al. 2020, equation 12, η = 0).

    This is also Euler's method on the probability-flow ODE in σ-space (Karras et al. 2022, algorithm 2 without
    churn): x + (σ' − σ)·ε̂ divided by √ᾱ' is the same expression. The two differ in their grids only.
    """
    for index, timestep, here, there in grid.levels():
        guess = denoise(latents, timestep, here)
        latents = math.sqrt(there) * guess.denoised + math.sqrt(1 - there) * guess.noise
        yield _step(index, timestep, here, latents, guess)


def ddpm(denoise: Denoise, latents: Latents, grid: Grid, noise: Callable[[], Latents]) -> Iterator[Step]:
    """Draw from the posterior q(z_t' | z_t, ẑ_0) (Ho et al. 2020, equation 7)."""
    for index, timestep, here, there in grid.levels():
        guess = denoise(latents, timestep, here)
        alpha = here / there
        mean = (
            math.sqrt(there) * (1 - alpha) / (1 - here) * guess.denoised
            + math.sqrt(alpha) * (1 - there) / (1 - here) * guess.latents
        )
        variance = (1 - there) / (1 - here) * (1 - alpha)
        latents = mean + math.sqrt(variance) * noise() if variance > 0 else mean
        yield _step(index, timestep, here, latents, guess)


def euler_ancestral(denoise: Denoise, latents: Latents, grid: Grid, noise: Callable[[], Latents]) -> Iterator[Step]:
    """An Euler step below the next level, then fresh noise up to it (k-diffusion ``sample_euler_ancestral``)."""
    for index, timestep, here, there in grid.levels():
        guess = denoise(latents, timestep, here)
        sigma, next_sigma = _sigma(here), _sigma(there)
        up = math.sqrt(next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2)
        down = math.sqrt(next_sigma**2 - up**2)
        latents = guess.denoised + down * guess.noise
        if up > 0:
            latents = latents + up * noise()
        latents = math.sqrt(there) * latents
        yield _step(index, timestep, here, latents, guess)


def dpmpp_2m(denoise: Denoise, latents: Latents, grid: Grid, noise: Callable[[], Latents]) -> Iterator[Step]:
    """DPM-Solver++(2M), the midpoint form (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""
    previous, previous_h = None, 0.0
    for index, timestep, here, there in grid.levels():
        guess = denoise(latents, timestep, here)
        direction = guess.denoised
        h = math.log(_sigma(here) / _sigma(there)) if there < 1 else math.inf
        # The first step is of first order, the last, to no noise at all, too, and one from where the last one stood.
        if previous is not None and previous_h > 0 and there < 1:
            direction = direction + h / (2 * previous_h) * (direction - previous)
        shrink = _sigma(there) / _sigma(here)  # e^-h
        latents = shrink * math.sqrt(there / here) * guess.latents + math.sqrt(there) * (1 - shrink) * direction
        previous, previous_h = guess.denoised, h
        yield _step(index, timestep, here, latents, guess)


def timestep_grid(schedule: NoiseSchedule, steps: int, spacing: Spacing) -> list[int]:
    """Whole timesteps in falling order, for DDPM and DDIM (arXiv 2305.08891, table 2)."""
    return [round(t) for t in np.round(_spaced(schedule, steps, spacing)).tolist()]


def ddpm_grid(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> Grid:
    """From each timestep to the next one of the list, and to no noise at the end."""
    timesteps = timestep_grid(schedule, steps, spacing)
    alphas = _alphas(schedule)[timesteps].tolist()
    return Grid(
        timesteps=[float(t) for t in timesteps],
        alphas_cumprod=alphas,
        next_alphas_cumprod=[*alphas[1:], 1.0],
    )


def ddim_grid(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> Grid:
    """From each timestep down by 1000 // steps, whatever the next one is; the end is ᾱ_0 unless configured to be 1."""
    table = _alphas(schedule)
    timesteps = timestep_grid(schedule, steps, spacing)
    stride = schedule.config.num_train_timesteps // steps
    end = 1.0 if schedule.config.set_alpha_to_one else float(table[0])
    return Grid(
        timesteps=[float(t) for t in timesteps],
        alphas_cumprod=table[timesteps].tolist(),
        next_alphas_cumprod=[float(table[t - stride]) if t >= stride else end for t in timesteps],
    )


def euler_grid(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> Grid:
    """σ interpolated between timesteps; with ``karras``, Karras' spacing of σ (2022, equation 5)."""
    sigmas = _sigmas(schedule)
    timesteps = _spaced(schedule, steps, spacing)
    chosen = np.interp(timesteps, np.arange(len(sigmas)), sigmas)
    if karras:
        chosen = _karras(chosen[-1], chosen[0], steps)
        timesteps = _timesteps_of(chosen, sigmas)
    grid = _sigma_grid(timesteps, chosen)
    # "leading" starts below the last timestep and its latents are taken for noise plus a picture's variance.
    scale = 1.0 if spacing == "leading" else math.sqrt(1 - grid.alphas_cumprod[0])
    return Grid(**{**vars(grid), "start_scale": scale})


def dpm_grid(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> Grid:
    """As multistep solvers space their steps: one more interval than steps, whole timesteps."""
    sigmas = _sigmas(schedule)
    if karras:
        chosen = _karras(sigmas[0], sigmas[-1], steps)
        return _sigma_grid(np.round(_timesteps_of(chosen, sigmas)), chosen)
    last = schedule.config.num_train_timesteps
    if spacing == "linspace":
        timesteps = np.linspace(0, last - 1, steps + 1).round()[:0:-1]
    elif spacing == "leading":
        timesteps = (np.arange(steps + 1) * (last // (steps + 1)))[:0:-1] + float(schedule.config.steps_offset)
    else:
        timesteps = np.round(_spaced(schedule, steps, spacing))
    return _sigma_grid(timesteps, sigmas[timesteps.astype(int)])


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler by name: its function, its grid, and the spacing it takes where the model's folder is silent."""

    function: SamplerFunction
    grid: Callable[[NoiseSchedule, int, Spacing, bool], Grid]
    spacing: Spacing
    karras: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(function=ddpm, grid=ddpm_grid, spacing="leading"),
    "ddim": Sampler(function=ddim, grid=ddim_grid, spacing="leading"),
    "euler": Sampler(function=ddim, grid=euler_grid, spacing="linspace"),
    "euler_karras": Sampler(function=ddim, grid=euler_grid, spacing="linspace", karras=True),
    "euler_ancestral": Sampler(function=euler_ancestral, grid=euler_grid, spacing="linspace"),
    "dpmpp_2m": Sampler(function=dpmpp_2m, grid=dpm_grid, spacing="linspace"),
    "dpmpp_2m_karras": Sampler(function=dpmpp_2m, grid=dpm_grid, spacing="linspace", karras=True),
}


def sample(
    name: str,
    denoise: Denoise,
    schedule: NoiseSchedule,
    start_noise: Latents,
    steps: int,
    noise: Callable[[], Latents],
) -> Iterator[Step]:
    """Run the sampler called ``name`` from standard noise; the last step's ``latents`` are the picture's.

    ``noise`` gives each stochastic step its standard noise, in order. Raises :class:`UsageError` for an unknown
    name, or for more steps than the schedule has timesteps.
    """
    grid = find_grid(name, schedule, steps)
    return find_sampler(name).function(denoise, start_noise * grid.start_scale, grid, noise)


def find_grid(name: str, schedule: NoiseSchedule, steps: int) -> Grid:
    """The timesteps and noise levels at which a sampler will stand; raises as :func:`sample` does."""
    sampler = find_sampler(name)
    if not 1 <= steps <= schedule.config.num_train_timesteps:
        raise UsageError(f"{steps} steps asked for: give a number from 1 to {schedule.config.num_train_timesteps}")
    return sampler.grid(schedule, steps, schedule.config.timestep_spacing or sampler.spacing, sampler.karras)


def find_sampler(name: str) -> Sampler:
    """The sampler of that name; raises :class:`UsageError` with the choices."""
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}: the choices are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _step(index: int, timestep: float, alpha_cumprod: float, latents: Tensor, guess: Guess) -> Step:
    return Step(
        index=index,
        timestep=timestep,
        sigma=_sigma(alpha_cumprod) if alpha_cumprod > 0 else math.inf,
        latents=latents,
        denoised=guess.denoised,
        maps=guess.maps,
    )


def _sigma(alpha_cumprod: float) -> float:
    return math.sqrt((1 - alpha_cumprod) / alpha_cumprod)


def _alphas(schedule: NoiseSchedule) -> np.ndarray:
    return schedule.alphas_cumprod.double().numpy()


def _sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """σ of every training timestep, rising; finite also where ᾱ ends at zero."""
    alphas = _alphas(schedule)
    if schedule.config.rescale_betas_zero_snr:
        alphas[-1] = TINY_ALPHA_CUMPROD
    return np.sqrt((1 - alphas) / alphas)


def _sigma_grid(timesteps: np.ndarray, sigmas: np.ndarray) -> Grid:
    alphas = (1 / (1 + sigmas**2)).tolist()
    return Grid(timesteps=timesteps.tolist(), alphas_cumprod=alphas, next_alphas_cumprod=[*alphas[1:], 1.0])


def _spaced(schedule: NoiseSchedule, steps: int, spacing: Spacing) -> np.ndarray:
    """Timesteps in falling order, not yet rounded (arXiv 2305.08891, table 2)."""
    last = schedule.config.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps)[::-1]
    if spacing == "leading":
        return np.minimum((np.arange(steps) * (last // steps))[::-1] + float(schedule.config.steps_offset), last - 1)
    return np.arange(last, 0, -last / steps).round() - 1


def _karras(low: float, high: float, steps: int, rho: float = 7.0) -> np.ndarray:
    ramp = np.linspace(0, 1, steps)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def _timesteps_of(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The fractional timesteps at which the schedule has these σ, interpolated in log σ."""
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))
