"""From noise to latents: each sampler one generator function over one contract."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gobelin.errors import UsageError
from gobelin.samplers.first_order import ddim, ddpm, euler_ancestral, lcm
from gobelin.samplers.multistep import deis, dpmpp_2m, dpmpp_2m_sde, lms, pndm, uni_pc
from gobelin.samplers.noise_levels import (
    NoiseLevels,
    ddim_levels,
    ddpm_levels,
    deis_levels,
    dpm_2_levels,
    dpm_levels,
    euler_levels,
    lcm_levels,
    pndm_levels,
)
from gobelin.samplers.second_order import dpm_2, dpm_2_ancestral, heun
from gobelin.samplers.step import Denoise, DenoiserOutput, Latents, NoiseSource, SamplerFunction, Step
from gobelin.schedule import NoiseSchedule, Spacing

__all__ = [
    "SAMPLERS",
    "Denoise",
    "DenoiserOutput",
    "Latents",
    "NoiseLevels",
    "NoiseSource",
    "Sampler",
    "Step",
    "find_noise_levels",
    "find_sampler",
    "img2img_levels",
    "sample_latents",
]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler by name: its function, its grid, and the spacing it takes where the model's folder is silent."""

    function: SamplerFunction
    levels: Callable[[NoiseSchedule, int, Spacing, bool], NoiseLevels]
    spacing: Spacing
    karras: bool = False


def _with_karras(name: str, sampler: Sampler) -> dict[str, Sampler]:
    return {name: sampler, f"{name}_karras": replace(sampler, karras=True)}


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(function=ddpm, levels=ddpm_levels, spacing="leading"),
    "ddim": Sampler(function=ddim, levels=ddim_levels, spacing="leading"),
    "pndm": Sampler(function=pndm, levels=pndm_levels, spacing="leading"),
    "lcm": Sampler(function=lcm, levels=lcm_levels, spacing="leading"),
    **_with_karras("euler", Sampler(function=ddim, levels=euler_levels, spacing="linspace")),
    "euler_ancestral": Sampler(function=euler_ancestral, levels=euler_levels, spacing="linspace"),
    **_with_karras("heun", Sampler(function=heun, levels=euler_levels, spacing="linspace")),
    **_with_karras("lms", Sampler(function=lms, levels=euler_levels, spacing="linspace")),
    **_with_karras("dpm_2", Sampler(function=dpm_2, levels=dpm_2_levels, spacing="linspace")),
    **_with_karras("dpm_2_ancestral", Sampler(function=dpm_2_ancestral, levels=dpm_2_levels, spacing="linspace")),
    **_with_karras("dpmpp_2m", Sampler(function=dpmpp_2m, levels=dpm_levels, spacing="linspace")),
    **_with_karras("dpmpp_2m_sde", Sampler(function=dpmpp_2m_sde, levels=dpm_levels, spacing="linspace")),
    **_with_karras("uni_pc", Sampler(function=uni_pc, levels=dpm_levels, spacing="linspace")),
    **_with_karras("deis", Sampler(function=deis, levels=deis_levels, spacing="linspace")),
}


def sample_latents(
    name: str,
    denoise: Denoise,
    grid: NoiseLevels,
    start_noise: Latents,
    noise: Callable[[], Latents],
    clean: Latents | None = None,
) -> Iterator[Step]:
    """Run the sampler called ``name`` along a grid of its own; the last step's ``latents`` are the picture's.

    It begins with standard noise, or with ``clean`` latents under as much of it as the grid begins with; ``noise``
    gives each stochastic step its own, in order. Raises :class:`UsageError` for an unknown name.
    """
    start = start_noise * grid.start_scale
    if clean is not None:
        level = grid.alphas_cumprod[0]
        start = math.sqrt(level) * clean + math.sqrt(1 - level) * start_noise
    return find_sampler(name).function(denoise, start, grid, noise)


def img2img_levels(grid: NoiseLevels, steps: int, strength: float) -> NoiseLevels:
    """The rest of a grid that painting over a picture goes through: the share ``strength`` of its ``steps``.

    Raises :class:`UsageError` where none is left.
    """
    if not 0 <= strength <= 1:
        raise UsageError(f"the strength is {strength}: give a share from 0 (the picture as it is) to 1 (nothing of it)")
    left = min(int(steps * strength), steps)
    if not left:
        raise UsageError(f"a strength of {strength} leaves none of {steps} steps: give {1 / steps:.2g} or more")
    return grid.after(steps - left)


def find_noise_levels(name: str, schedule: NoiseSchedule, steps: int) -> NoiseLevels:
    """The timesteps and noise levels at which a sampler will stand.

    Raises :class:`UsageError` for an unknown name, and for more steps than the schedule has timesteps.
    """
    sampler = find_sampler(name)
    if not 1 <= steps <= schedule.config.num_train_timesteps:
        raise UsageError(f"{steps} steps asked for: give a number from 1 to {schedule.config.num_train_timesteps}")
    return sampler.levels(schedule, steps, schedule.config.timestep_spacing or sampler.spacing, sampler.karras)


def find_sampler(name: str) -> Sampler:
    """The sampler of that name; raises :class:`UsageError` with the choices."""
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}: the choices are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
