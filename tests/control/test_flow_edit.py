"""From a finished picture to a changed one: what is carried, by denoisers that are known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gobelin.control.flow_edit import FlowEdit, flow_edit
from gobelin.samplers import DenoiserOutput, NoiseSource
from gobelin.schedule import NoiseSchedule, ScheduleConfig

SCHEDULES = [ScheduleConfig.sd15(), ScheduleConfig.zero_terminal_snr()]


def run(
    clean_of: Callable[[Tensor, float], Tensor], config: ScheduleConfig, steps: int = 5, gain: float = 0.0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Images, what becomes of them, and what was shown on the way; ``clean_of(noisy, ᾱ)`` returns clean ones."""
    pictures = torch.randn(3, 4, 5, 7)
    shown = []

    def denoise(noisy: Tensor, timestep: float, alpha_cumprod: float) -> DenoiserOutput:
        shown.append(noisy)
        return DenoiserOutput(latents=noisy, denoised=clean_of(noisy, alpha_cumprod), noise=noisy)

    noise = NoiseSource([torch.Generator().manual_seed(seed) for seed in range(6)], (4, 5, 7))
    levels = FlowEdit(latents=torch.zeros(1, 4, 5, 7)).levels(NoiseSchedule(config), steps)
    *_, last = flow_edit(denoise, pictures.repeat(2, 1, 1, 1), levels, noise, gain)
    return pictures, last.latents, shown


@pytest.mark.parametrize("config", SCHEDULES)
def test_what_is_seen_alike_stays(config: ScheduleConfig) -> None:
    pictures, latents, shown = run(lambda noisy, _: noisy.tanh(), config, gain=0.3)
    assert torch.equal(latents, pictures.repeat(2, 1, 1, 1))
    assert all(torch.equal(*noisy.chunk(2)) for noisy in shown), "both under the same noise"


@pytest.mark.parametrize("config", SCHEDULES)
def test_the_difference_that_is_seen_is_what_changes(config: ScheduleConfig) -> None:
    change = torch.randn(3, 4, 5, 7)
    apart = torch.cat([torch.zeros_like(change), change])
    pictures, latents, shown = run(lambda noisy, _: apart, config)
    assert torch.equal(latents[:3], pictures)
    assert torch.allclose(latents[3:], pictures + change, atol=1e-5)
    assert not torch.equal(shown[0][0], shown[1][0]), "noise is fresh at each level"


def test_steps_are_eulers_in_sigma() -> None:
    config = ScheduleConfig.sd15()
    change = torch.randn(3, 4, 5, 7)
    levels = FlowEdit(latents=torch.zeros(1, 4, 5, 7)).levels(NoiseSchedule(config), 3)

    def clean_of(noisy: Tensor, alpha_cumprod: float) -> Tensor:
        return torch.cat([torch.zeros_like(change), alpha_cumprod * change])

    pictures, latents, _ = run(clean_of, config, steps=3, gain=0.5)
    sigmas = [math.sqrt((1 - alpha) / alpha) for alpha in levels.alphas_cumprod]
    carried = 0.0
    for alpha, sigma, next_sigma in zip(levels.alphas_cumprod, sigmas, [*sigmas[1:], 0.0], strict=True):
        slope = (carried - alpha * (1 + 0.5 * (1 - alpha))) / sigma
        carried += (next_sigma - sigma) * slope
    assert torch.allclose(latents[3:], pictures + carried * change, atol=1e-4)
    assert levels.timesteps[0] == 999
