"""Where samplers stand: timesteps and noise levels, spaced as each of them spaces them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from gobelin.errors import UsageError
from gobelin.schedule import TINY_ALPHA_CUMPROD, NoiseSchedule, Spacing

LCM_STEPS = 50
"""How many timesteps latent consistency models are distilled at, and so the most that they can be run at."""


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """The noise levels that a sampler visits: step i goes from ``alphas_cumprod[i]`` to ``next_alphas_cumprod[i]``.

    ``start_scale`` is what standard noise is multiplied by to stand at the first level. For some samplers only:
    ``sigmas`` are those of all timesteps; ``velocity`` says that this is what the model predicts; ``above`` is each
    row's ᾱ one stride before it, and where there is one the first two rows are one step. ``skipped`` is how many rows
    there were before the first, of which a picture stands in the place.
    """

    timesteps: list[float]
    alphas_cumprod: list[float]
    next_alphas_cumprod: list[float]
    start_scale: float = 1.0
    sigmas: np.ndarray = field(default_factory=lambda: np.ones(1))
    velocity: bool = False
    above: list[float] = field(default_factory=list)
    skipped: int = 0

    def intervals(self) -> Iterator[tuple[int, float, float, float]]:
        """(index, timestep, ᾱ from, ᾱ to) of each step."""
        rows = zip(self.timesteps, self.alphas_cumprod, self.next_alphas_cumprod, strict=True)
        return ((index, *row) for index, row in enumerate(rows))

    @property
    def steps(self) -> int:
        """How many steps are taken."""
        return len(self.timesteps) - (1 if len(self.above) > 1 else 0)

    def timestep_of(self, sigma: float) -> float:
        """The timestep, fractional, at which the schedule has this σ."""
        return float(_timesteps_of(np.array([sigma]), self.sigmas)[0])

    def after(self, index: int) -> "NoiseLevels":
        """The rest of it from a step on."""
        rows = (self.timesteps, self.alphas_cumprod, self.next_alphas_cumprod)
        timesteps, alphas, others = (row[index:] for row in rows)
        return replace(
            self,
            timesteps=timesteps,
            alphas_cumprod=alphas,
            next_alphas_cumprod=others,
            above=self.above[index:],
            skipped=self.skipped + index,
        )


def spaced_timesteps(schedule: NoiseSchedule, steps: int, spacing: Spacing) -> list[int]:
    """Whole timesteps in falling order, for DDPM and DDIM (arXiv 2305.08891, table 2)."""
    return [round(t) for t in np.round(_spaced(schedule, steps, spacing)).tolist()]


def ddpm_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
    """From each timestep to the next one of the list, and to no noise at the end."""
    timesteps = spaced_timesteps(schedule, steps, spacing)
    alphas = _alphas(schedule)[timesteps].tolist()
    return NoiseLevels(
        timesteps=[float(t) for t in timesteps],
        alphas_cumprod=alphas,
        next_alphas_cumprod=[*alphas[1:], 1.0],
    )


def ddim_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
    """From each timestep down by 1000 // steps, whatever the next one is; the end is ᾱ_0 unless configured to be 1."""
    table = _alphas(schedule)
    timesteps = spaced_timesteps(schedule, steps, spacing)
    stride = schedule.config.num_train_timesteps // steps
    end = 1.0 if schedule.config.set_alpha_to_one else float(table[0])
    return NoiseLevels(
        timesteps=[float(t) for t in timesteps],
        alphas_cumprod=table[timesteps].tolist(),
        next_alphas_cumprod=[float(table[t - stride]) if t >= stride else end for t in timesteps],
    )


def euler_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
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
    return replace(grid, start_scale=scale, sigmas=sigmas)


def dpm_2_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
    """The same, but Karras' timesteps are whole."""
    grid = euler_levels(schedule, steps, spacing, karras)
    return replace(grid, timesteps=np.round(grid.timesteps).tolist()) if karras else grid


def pndm_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
    """As DDIM's, with its second row twice: the first step asks there too. It never begins with nothing but noise."""
    grid = ddim_levels(schedule, steps, spacing, karras)
    rows = [0, *range(1, steps)[:1], *range(1, steps)]
    stride = schedule.config.num_train_timesteps // steps
    table = np.maximum(_alphas(schedule), TINY_ALPHA_CUMPROD)
    timesteps = [grid.timesteps[row] for row in rows]
    return replace(
        grid,
        timesteps=timesteps,
        alphas_cumprod=[max(grid.alphas_cumprod[row], TINY_ALPHA_CUMPROD) for row in rows],
        next_alphas_cumprod=[grid.next_alphas_cumprod[row] for row in rows],
        velocity=schedule.prediction_type == "v_prediction",
        above=[float(table[min(round(timestep) + stride, len(table) - 1)]) for timestep in timesteps],
    )


def lcm_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
    """Some of the evenly spaced timesteps that latent consistency models are distilled at."""
    if steps > LCM_STEPS:
        raise UsageError(f"{steps} steps asked for: lcm takes {LCM_STEPS} at most, which it is made for")
    if schedule.config.num_train_timesteps < LCM_STEPS:
        raise UsageError(f"lcm needs a schedule of {LCM_STEPS} timesteps or more")
    distilled = np.arange(1, LCM_STEPS + 1) * (schedule.config.num_train_timesteps // LCM_STEPS) - 1
    timesteps = distilled[::-1][np.linspace(0, LCM_STEPS, steps, endpoint=False).astype(int)]
    alphas = _alphas(schedule)[timesteps].tolist()
    return NoiseLevels(
        timesteps=timesteps.astype(float).tolist(), alphas_cumprod=alphas, next_alphas_cumprod=[*alphas[1:], alphas[-1]]
    )


def deis_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
    """As the other multistep solvers', to the first timestep's noise; Karras' grid stays where it ends."""
    grid = dpm_levels(schedule, steps, spacing, karras)
    end = grid.alphas_cumprod[-1] if karras else float(_alphas(schedule)[0])
    return replace(grid, next_alphas_cumprod=[*grid.next_alphas_cumprod[:-1], end])


def dpm_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
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
    return _sigma_grid(timesteps, np.interp(timesteps, np.arange(last), sigmas))


def _alphas(schedule: NoiseSchedule) -> np.ndarray:
    return schedule.alphas_cumprod.double().numpy()


def _sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """σ of every training timestep, rising; finite also where ᾱ ends at zero."""
    alphas = _alphas(schedule)
    if schedule.config.rescale_betas_zero_snr:
        alphas[-1] = TINY_ALPHA_CUMPROD
    return np.sqrt((1 - alphas) / alphas)


def _sigma_grid(timesteps: np.ndarray, sigmas: np.ndarray) -> NoiseLevels:
    alphas = (1 / (1 + sigmas**2)).tolist()
    return NoiseLevels(timesteps=timesteps.tolist(), alphas_cumprod=alphas, next_alphas_cumprod=[*alphas[1:], 1.0])


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
