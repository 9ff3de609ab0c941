"""Noise levels of samplers: timesteps and ᾱ, spaced as each sampler spaces them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gobelin.errors import UsageError
from gobelin.schedule import TINY_ALPHA_CUMPROD, NoiseSchedule, PredictionType, Spacing

FloatArray = NDArray[np.float64]

LCM_STEPS = 50
"""The timesteps of the DDIM solver that latent consistency models are distilled with (Luo et al. 2023, arXiv
2310.04378; diffusers' ``original_inference_steps``), and so the most steps that ``lcm`` takes."""

_KARRAS_RHO = 7.0  # Karras et al. 2022, table 1; every implementation's default


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """The noise levels that a sampler visits: row i goes from ``alphas_cumprod[i]`` to ``next_alphas_cumprod[i]``.

    ``timesteps`` (0 … 999, some samplers' fractional) belong to ``alphas_cumprod``. ``start_scale`` is the factor that
    brings standard noise to the first level.
    """

    timesteps: list[float]
    alphas_cumprod: list[float]
    next_alphas_cumprod: list[float]
    start_scale: float = 1.0

    def intervals(self) -> Iterator[tuple[int, float, float, float]]:
        """Iterate over the rows: (index, timestep, ᾱ from, ᾱ to)."""
        rows = zip(self.timesteps, self.alphas_cumprod, self.next_alphas_cumprod, strict=True)
        return ((index, *row) for index, row in enumerate(rows))

    @property
    def steps(self) -> int:
        """The number of steps that a sampler yields."""
        return len(self.timesteps)

    def after(self, index: int) -> Self:
        """Leave out the rows before ``index``."""
        return replace(
            self,
            timesteps=self.timesteps[index:],
            alphas_cumprod=self.alphas_cumprod[index:],
            next_alphas_cumprod=self.next_alphas_cumprod[index:],
        )


@dataclass(frozen=True, kw_only=True)
class PNDMNoiseLevels(NoiseLevels):
    """Noise levels for PNDM, the first two rows of which are one step, with two calls of the denoiser.

    ``previous_alphas_cumprod`` is each row's ᾱ one stride of timesteps before it, where there is more noise.
    """

    previous_alphas_cumprod: list[float]
    prediction_type: PredictionType

    @property
    def steps(self) -> int:
        """The number of steps that PNDM yields."""
        return max(1, len(self.timesteps) - 1)

    def after(self, index: int) -> Self:
        """Leave out the rows before ``index``; the first two that remain are one step."""
        return replace(super().after(index), previous_alphas_cumprod=self.previous_alphas_cumprod[index:])


@dataclass(frozen=True, kw_only=True)
class DPM2NoiseLevels(NoiseLevels):
    """Noise levels for DPM2, which also calls the denoiser between them: ``training_sigmas`` are σ of all timesteps."""

    training_sigmas: FloatArray

    def timestep_of(self, sigma: float) -> float:
        """Find the timestep, fractional, at which the schedule has this σ."""
        return float(_timesteps_of(np.array([sigma]), self.training_sigmas)[0])


@dataclass(frozen=True, kw_only=True)
class DEISNoiseLevels(NoiseLevels):
    """Noise levels for DEIS; ``all_steps`` is the number of steps from pure noise, however many are left out."""

    all_steps: int


def spaced_timesteps(schedule: NoiseSchedule, steps: int, spacing: Spacing) -> list[int]:
    """Space whole timesteps, in falling order, for DDPM and DDIM (arXiv 2305.08891, table 2)."""
    return [round(t) for t in np.round(_spaced(schedule, steps, spacing)).tolist()]


def ddpm_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
    """Go from each timestep to the next one of the list, and to no noise at the end."""
    timesteps = spaced_timesteps(schedule, steps, spacing)
    alphas: list[float] = _alphas(schedule)[timesteps].tolist()
    return NoiseLevels(
        timesteps=[float(t) for t in timesteps],
        alphas_cumprod=alphas,
        next_alphas_cumprod=[*alphas[1:], 1.0],
    )


def ddim_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
    """Go from each timestep down by 1000 // steps, whatever the next one is; the end is ᾱ_0 unless configured as 1."""
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
    """Interpolate σ between timesteps; with ``karras``, space σ as Karras et al. 2022, equation 5."""
    sigmas = _sigmas(schedule)
    timesteps = _spaced(schedule, steps, spacing)
    chosen = np.interp(timesteps, np.arange(len(sigmas)), sigmas)
    if karras:
        chosen = _karras(chosen[-1], chosen[0], steps)
        timesteps = _timesteps_of(chosen, sigmas)
    levels = _sigma_levels(timesteps, chosen)
    # The noise alone in σ-space, σ·ε; with "leading", which starts below the last timestep, √(σ² + 1)·ε (diffusers'
    # init_noise_sigma), as if the image's variance were in it.
    return replace(levels, start_scale=1.0 if spacing == "leading" else math.sqrt(1 - levels.alphas_cumprod[0]))


def dpm_2_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> DPM2NoiseLevels:
    """Space noise levels as Euler's; Karras' timesteps are whole."""
    levels = euler_levels(schedule, steps, spacing, karras)
    return DPM2NoiseLevels(
        timesteps=np.round(levels.timesteps).tolist() if karras else levels.timesteps,
        alphas_cumprod=levels.alphas_cumprod,
        next_alphas_cumprod=levels.next_alphas_cumprod,
        start_scale=levels.start_scale,
        training_sigmas=_sigmas(schedule),
    )


def pndm_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> PNDMNoiseLevels:
    """Space noise levels as DDIM's, with the second row twice, for the second call of the first step.

    PNDM is written in σ-space, so that ᾱ is kept above 0 where zero terminal SNR makes it 0.
    """
    levels = ddim_levels(schedule, steps, spacing, karras)
    rows = [0, *range(1, steps)[:1], *range(1, steps)]
    stride = schedule.config.num_train_timesteps // steps
    table = np.maximum(_alphas(schedule), TINY_ALPHA_CUMPROD)
    timesteps = [levels.timesteps[row] for row in rows]
    return PNDMNoiseLevels(
        timesteps=timesteps,
        alphas_cumprod=[max(levels.alphas_cumprod[row], TINY_ALPHA_CUMPROD) for row in rows],
        next_alphas_cumprod=[levels.next_alphas_cumprod[row] for row in rows],
        previous_alphas_cumprod=[float(table[min(round(t) + stride, len(table) - 1)]) for t in timesteps],
        prediction_type=schedule.prediction_type,
    )


def lcm_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
    """Choose among the evenly spaced timesteps that latent consistency models are distilled at.

    Raises :class:`UsageError` for more steps than :data:`LCM_STEPS`, and for a schedule of fewer timesteps.
    """
    if steps > LCM_STEPS:
        raise UsageError(f"{steps} steps asked for: lcm takes {LCM_STEPS} at most, which it is made for")
    if schedule.config.num_train_timesteps < LCM_STEPS:
        raise UsageError(f"lcm needs a schedule of {LCM_STEPS} timesteps or more")
    distilled = np.arange(1, LCM_STEPS + 1) * (schedule.config.num_train_timesteps // LCM_STEPS) - 1
    timesteps = distilled[::-1][np.linspace(0, LCM_STEPS, steps, endpoint=False).astype(int)]
    alphas: list[float] = _alphas(schedule)[timesteps].tolist()
    return NoiseLevels(
        timesteps=timesteps.astype(float).tolist(), alphas_cumprod=alphas, next_alphas_cumprod=[*alphas[1:], alphas[-1]]
    )


def dpm_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> NoiseLevels:
    """Space whole timesteps as multistep solvers do: one interval more than there are steps."""
    sigmas = _sigmas(schedule)
    if karras:
        chosen = _karras(sigmas[0], sigmas[-1], steps)
        return _sigma_levels(np.round(_timesteps_of(chosen, sigmas)), chosen)
    last = schedule.config.num_train_timesteps
    if spacing == "linspace":
        timesteps = np.linspace(0, last - 1, steps + 1).round()[:0:-1]
    elif spacing == "leading":
        timesteps = (np.arange(steps + 1.0) * (last // (steps + 1)))[:0:-1] + schedule.config.steps_offset
    else:
        timesteps = np.round(_spaced(schedule, steps, spacing))
    return _sigma_levels(timesteps, np.interp(timesteps, np.arange(last), sigmas))


def deis_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing, karras: bool) -> DEISNoiseLevels:
    """Space noise levels as the other multistep solvers', but end at ᾱ_0; Karras' end at their own last σ."""
    levels = dpm_levels(schedule, steps, spacing, karras)
    end = levels.alphas_cumprod[-1] if karras else float(_alphas(schedule)[0])
    return DEISNoiseLevels(
        timesteps=levels.timesteps,
        alphas_cumprod=levels.alphas_cumprod,
        next_alphas_cumprod=[*levels.next_alphas_cumprod[:-1], end],
        all_steps=levels.steps,
    )


def _alphas(schedule: NoiseSchedule) -> FloatArray:
    """Read ᾱ of every training timestep, falling, as float64."""
    return np.array(schedule.alphas_cumprod.double(), dtype=np.float64)


def _sigmas(schedule: NoiseSchedule) -> FloatArray:
    """Compute σ of every training timestep, rising; finite also where ᾱ ends at zero."""
    alphas = _alphas(schedule)
    if schedule.config.rescale_betas_zero_snr:
        alphas[-1] = TINY_ALPHA_CUMPROD
    return np.sqrt((1 - alphas) / alphas)


def _sigma_levels(timesteps: FloatArray, sigmas: FloatArray) -> NoiseLevels:
    """Make noise levels that go from each σ to the next one, and to no noise at the end."""
    alphas: list[float] = (1 / (1 + sigmas**2)).tolist()
    return NoiseLevels(timesteps=timesteps.tolist(), alphas_cumprod=alphas, next_alphas_cumprod=[*alphas[1:], 1.0])


def _spaced(schedule: NoiseSchedule, steps: int, spacing: Spacing) -> FloatArray:
    """Space timesteps in falling order, not yet rounded (arXiv 2305.08891, table 2)."""
    last = schedule.config.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps)[::-1]
    if spacing == "leading":
        return np.minimum((np.arange(float(steps)) * (last // steps))[::-1] + schedule.config.steps_offset, last - 1)
    return np.arange(last, 0, -last / steps).round() - 1


def _karras(low: float, high: float, steps: int) -> FloatArray:
    """Space σ from ``high`` to ``low`` evenly in σ^(1/ρ) (Karras et al. 2022, equation 5)."""
    ramp = np.linspace(0, 1, steps)
    top, bottom = high ** (1 / _KARRAS_RHO), low ** (1 / _KARRAS_RHO)
    return (top + ramp * (bottom - top)) ** _KARRAS_RHO


def _timesteps_of(sigmas: FloatArray, training_sigmas: FloatArray) -> FloatArray:
    """Find the fractional timesteps at which the schedule has these σ, interpolated in log σ."""
    return np.interp(np.log(sigmas), np.log(training_sigmas), np.arange(len(training_sigmas)))
