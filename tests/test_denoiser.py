"""The denoiser: a prediction split into clean latents and noise, in the latents' precision; its memory."""

import torch
from tests.conftest import relative_error
from tests.test_guidance import ALPHA, LATENTS, network, small_unet
from torch import Tensor

from gobelin.denoiser import Denoiser
from gobelin.guidance import Predictions, classifier_free_guidance


def test_a_unet_of_lower_precision_gets_and_gives_the_latents_precision() -> None:
    unet = small_unet()
    exact = Denoiser(network=network(unet), guidance=classifier_free_guidance(7.5))(LATENTS, 100.0, 0.5).denoised
    unet.bfloat16()
    rounded = Denoiser(network=network(unet, dtype=torch.bfloat16), guidance=classifier_free_guidance(7.5))
    denoised = rounded(LATENTS, 100.0, 0.5).denoised
    assert denoised.dtype == torch.float32
    assert relative_error(denoised, exact) < 0.1


def test_a_guidance_of_ones_own_decides_and_its_memory_lasts() -> None:
    unet = small_unet()

    def counting(predictions: Predictions) -> Tensor:
        predictions.memory["calls"] = predictions.memory.get("calls", 0) + 1
        return torch.full_like(predictions.noisy_latents, predictions.memory["calls"])

    denoiser = Denoiser(network=network(unet), guidance=counting)
    for calls in (1, 2):
        output = denoiser(LATENTS, 100.0, ALPHA)
        assert relative_error(output.denoised, 0.6 * LATENTS - 0.8 * calls) < 1e-6
    assert Denoiser(network=network(unet), guidance=counting).memory == {}
    assert denoiser.finish(LATENTS) is LATENTS
