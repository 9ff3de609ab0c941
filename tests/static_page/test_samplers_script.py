"""Guidance and samplers in JavaScript against ours, with a network of one line."""

from typing import Any

import pytest
import torch
from tests.conftest import relative_error
from tests.static_page.conftest import RunScript

from gobelin.guidance import rescale_guidance
from gobelin.samplers import DenoiserOutput, NoiseSource, find_noise_levels, sample_latents
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.static_page.writer import SAMPLERS_THERE

SAMPLE = """
const { sample } = await module("samplers");
const { Generator, drawNoise } = await module("noise");
const generator = new Generator(given.seed);
const predict = async (latents, timestep) => latents.map((x) => Math.fround(0.4) * x + Math.fround(timestep / 5000));
const steps = [];
const drawn = () => drawNoise(generator, 64);
for await (const step of sample({ ...given, predict, drawNoise: drawn })) {
  steps.push([[...step.latents], [...step.denoised]]);
}
return steps;
"""
GUIDE = """
const { guide } = await module("samplers");
const [negative, positive] = [given.negative, given.positive].map((values) => Float32Array.from(values));
return [...guide(negative, positive, given.scale, given.rescale)];
"""
SCHEDULES = {"velocity": ScheduleConfig.zero_terminal_snr(), "noise": ScheduleConfig.sd15()}


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS_THERE)
def test_samplers_step_as_ours_do(script: RunScript, name: str, kind: str, steps: int) -> None:
    schedule = NoiseSchedule(SCHEDULES[kind])
    levels = find_noise_levels(name, schedule, steps)

    def denoise(latents: torch.Tensor, timestep: float, alpha: float) -> DenoiserOutput:
        denoised, noise = schedule.split(0.4 * latents + timestep / 5000, latents, alpha)
        return DenoiserOutput(latents=latents, denoised=denoised, noise=noise)

    noise = NoiseSource([torch.Generator().manual_seed(3)], (4, 4, 4))
    theirs = list(sample_latents(name, denoise, levels, noise(), noise))
    given: dict[str, Any] = {
        "name": name,
        "kind": schedule.prediction_type,
        "seed": 3,
        "levels": {
            "timesteps": levels.timesteps,
            "alphas": levels.alphas_cumprod,
            "nextAlphas": levels.next_alphas_cumprod,
            "startScale": levels.start_scale,
        },
    }
    for (latents, denoised), step in zip(script(SAMPLE, given), theirs, strict=True):
        assert relative_error(torch.tensor(latents), step.latents.flatten()) < 1e-5
        assert relative_error(torch.tensor(denoised), step.denoised.flatten()) < 1e-5


@pytest.mark.parametrize(("scale", "rescale"), [(1.0, 0.0), (3.0, 0.0), (7.5, 0.7), (2.0, 1.0)])
def test_guidance_is_ours(script: RunScript, scale: float, rescale: float) -> None:
    negative, positive = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    given = {
        "negative": negative.flatten().tolist(),
        "positive": positive.flatten().tolist(),
        "scale": scale,
        "rescale": rescale,
    }
    ours = torch.tensor(script(GUIDE, given)).reshape(positive.shape)
    theirs = positive if scale == 1 else negative + scale * (positive - negative)
    assert relative_error(ours, rescale_guidance(theirs, positive, rescale if scale > 1 else 0)) < 1e-6
