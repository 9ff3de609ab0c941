"""From a finished picture to a changed one, without going back to noise."""

import math
from collections.abc import Callable, Iterator

import torch

from gobelin.samplers.noise_levels import NoiseLevels, euler_levels
from gobelin.samplers.step import Denoise, Latents, Step
from gobelin.schedule import NoiseSchedule


def flow_edit(
    denoise: Denoise, latents: Latents, grid: NoiseLevels, noise: Callable[[], Latents], gain: float = 0.0
) -> Iterator[Step]:
    """FlowEdit (Kulikov et al. 2024, arXiv 2412.08629, algorithm 1, n_avg = 1), at a diffusion's noise levels.

    The first half of ``latents`` are finished pictures, which stay as they are, and the second half what becomes of
    them. At each level both are put under the same fresh noise, and the *difference* δ of the two goes an Euler step in
    σ towards the difference Δ of the two guesses: δ' = σ'/σ · δ + (1 − σ'/σ) · (1 + gain · (1 − ᾱ)) · Δ. What the two
    prompts agree on takes no part in it. The ``gain`` is ours: under noise a guess sees only a part of what has changed
    already, and so Δ falls short of it. The steps' ``latents`` are pictures without noise.
    """
    source, target = latents.chunk(2)
    for index, timestep, here, there in grid.intervals():
        signal = math.sqrt(here)
        fresh = noise().chunk(2)[0]
        clean = torch.cat([source, target])
        guess = denoise(signal * clean + math.sqrt(1 - here) * fresh.repeat(2, 1, 1, 1), timestep, here)
        before, now = guess.latents.chunk(2)
        seen_before, seen_now = guess.denoised.chunk(2)
        left = math.sqrt((1 - there) / there * here / (1 - here))
        gained = 1 + gain * (1 - here)
        target = source + left * (now - before) / signal + (1 - left) * gained * (seen_now - seen_before)
        yield Step.of(index, timestep, here, torch.cat([source, target]), guess)


def flow_edit_levels(schedule: NoiseSchedule, steps: int) -> NoiseLevels:
    """Evenly spaced from the last timestep on, down to no noise."""
    return euler_levels(schedule, steps, "trailing", karras=False)
