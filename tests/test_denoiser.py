"""Guidance: the formula by hand, how often the U-Net runs, and the rescaling against diffusers'."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from tests.conftest import fill_, relative_error
from torch import Tensor

from gobelin.denoiser import Denoiser, rescale_guidance
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.unet import UNet, UNetConfig

LATENTS = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
TEXT, NEGATIVE = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def unet() -> UNet:
    config = UNetConfig.of(
        *(8,),
        attention=(True,),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return fill_(UNet(config))


@pytest.fixture
def rows(unet: UNet) -> list[int]:
    """How many rows each run of the U-Net had, in order."""
    seen = []
    unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def denoiser(unet: UNet, **options: float) -> Denoiser:
    schedule = NoiseSchedule(ScheduleConfig(prediction_type="v_prediction"))
    return Denoiser(unet=unet, schedule=schedule, text_embeddings=TEXT, negative_embeddings=NEGATIVE, **options)


@torch.no_grad()
def predictions(unet: UNet, timestep: float) -> tuple[Tensor, Tensor]:
    timesteps = torch.full((3,), timestep)
    return unet(LATENTS, timesteps, NEGATIVE), unet(LATENTS, timesteps, TEXT)


@pytest.mark.parametrize(("guidance", "rescale"), [(1.5, 0.0), (7.5, 0.0), (7.5, 0.7), (4.0, 1.0)])
def test_guidance_pulls_the_prediction_away_from_the_negative_one(
    unet: UNet, rows: list[int], guidance: float, rescale: float
) -> None:
    negative, positive = predictions(unet, 400.5)
    expected = negative + guidance * (positive - negative)
    if rescale:
        expected = rescale_noise_cfg(expected, positive, rescale)
    rows.clear()
    guided = denoiser(unet, guidance=guidance, guidance_rescale=rescale)
    guess = guided(LATENTS, 400.5, 0.36)
    assert rows == [6]
    assert relative_error(guess.denoised, 0.6 * LATENTS - 0.8 * expected) < 1e-5
    assert relative_error(guess.noise, 0.6 * expected + 0.8 * LATENTS) < 1e-5
    assert guess.latents is LATENTS
    assert guess.maps == {}
    assert not guess.denoised.requires_grad


@pytest.mark.parametrize("guidance", [1.0, 0.0, -3.0])
def test_guidance_of_one_or_less_runs_the_text_alone_and_once(unet: UNet, rows: list[int], guidance: float) -> None:
    _, positive = predictions(unet, 17.0)
    rows.clear()
    guess = denoiser(unet, guidance=guidance, guidance_rescale=0.5)(LATENTS, 17.0, 0.36)
    assert rows == [3]
    assert relative_error(guess.denoised, 0.6 * LATENTS - 0.8 * positive) < 1e-6
    assert relative_error(guess.noise, 0.6 * positive + 0.8 * LATENTS) < 1e-6


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaling_is_diffusers(rescale: float) -> None:
    guided, positive = 5 * torch.randn(3, 4, 6, 6) + 1, torch.randn(3, 4, 6, 6)
    assert (
        relative_error(rescale_guidance(guided, positive, rescale), rescale_noise_cfg(guided, positive, rescale)) < 1e-6
    )


def test_a_unet_of_lower_precision_gets_and_gives_the_latents_precision(unet: UNet) -> None:
    exact = denoiser(unet)(LATENTS, 100.0, 0.5).denoised
    unet.bfloat16()
    rounded = Denoiser(
        unet=unet,
        schedule=NoiseSchedule(ScheduleConfig(prediction_type="v_prediction")),
        text_embeddings=TEXT.bfloat16(),
        negative_embeddings=NEGATIVE.bfloat16(),
    )
    denoised = rounded(LATENTS, 100.0, 0.5).denoised
    assert denoised.dtype == torch.float32
    assert relative_error(denoised, exact) < 0.1
