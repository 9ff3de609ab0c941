"""Samplers: from noise to latents, each one generator function over one contract (:mod:`gobelin.samplers.step`).

A new sampler is an entry of :data:`SAMPLERS`; its name is then accepted wherever a sampler is named.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic

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
from gobelin.samplers.step import (
    Denoise,
    DenoiserOutput,
    DrawNoise,
    Latents,
    Levels,
    NoiseSource,
    SamplerFunction,
    Step,
)
from gobelin.schedule import NoiseSchedule, Spacing

__all__ = [
    "SAMPLERS",
    "Denoise",
    "DenoiserOutput",
    "DrawNoise",
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
class Sampler(Generic[Levels]):
    """A sampler: its function, and its noise levels as ``levels(schedule, steps, spacing, karras)``.

    ``spacing`` is the timesteps' where the model's scheduler config names none (diffusers' default for the sampler);
    ``karras`` asks for Karras' spacing of σ.
    """

    function: SamplerFunction[Levels]
    levels: Callable[[NoiseSchedule, int, Spacing, bool], Levels]
    spacing: Spacing
    karras: bool = False


def _with_karras(name: str, sampler: Sampler[Levels]) -> dict[str, Sampler[Levels]]:
    """List a sampler, and beside it the same one at Karras' noise levels."""
    return {name: sampler, f"{name}_karras": replace(sampler, karras=True)}


SAMPLERS: dict[str, Sampler[Any]] = {
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
"""Every sampler by its name: the names that settings, the command line and PNG texts accept."""


def sample_latents(
    name: str,
    denoise: Denoise,
    levels: NoiseLevels,
    start_noise: Latents,
    draw_noise: DrawNoise,
    init_latents: Latents | None = None,
) -> Iterator[Step]:
    """Run the sampler called ``name`` at noise levels of its own (:func:`find_noise_levels`).

    It begins with standard noise, or with ``init_latents`` under the noise of the first level; ``draw_noise`` gives
    each stochastic step its noise, in order. The last step's ``latents`` are the image's. Raises :class:`UsageError`
    for an unknown name.
    """
    start = start_noise * levels.start_scale
    if init_latents is not None:
        alpha = levels.alphas_cumprod[0]
        start = math.sqrt(alpha) * init_latents + math.sqrt(1 - alpha) * start_noise
    return find_sampler(name).function(denoise, start, levels, draw_noise)


def img2img_levels(levels: NoiseLevels, steps: int, strength: float) -> NoiseLevels:
    """Cut noise levels to the share ``strength`` (0 to 1) of their ``steps`` that an init image goes through.

    Raises :class:`UsageError` where no step is left (SDEdit, Meng et al. 2021, arXiv 2108.01073).
    """
    if not 0 <= strength <= 1:
        raise UsageError(f"the strength is {strength}: give a number from 0 (the image as it is) to 1 (none of it)")
    left = min(int(steps * strength), steps)
    if not left:
        raise UsageError(f"a strength of {strength} leaves none of {steps} steps: give {1 / steps:.2g} or more")
    return levels.after(steps - left)


def find_noise_levels(name: str, schedule: NoiseSchedule, steps: int) -> NoiseLevels:
    """Find the noise levels of the sampler called ``name``, in the schedule's timestep spacing or the sampler's own.

    Raises :class:`UsageError` for an unknown name, and for more steps than the schedule has timesteps.
    """
    sampler = find_sampler(name)
    if not 1 <= steps <= schedule.config.num_train_timesteps:
        raise UsageError(f"{steps} steps asked for: give a number from 1 to {schedule.config.num_train_timesteps}")
    return sampler.levels(schedule, steps, schedule.config.timestep_spacing or sampler.spacing, sampler.karras)


def find_sampler(name: str) -> Sampler[Any]:
    """Find the sampler of that name. Raises :class:`UsageError` with the choices for an unknown one."""
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}: the choices are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
