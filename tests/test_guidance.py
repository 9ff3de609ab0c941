"""Guidance: the formulas by hand, their limits against each other, and how often the U-Net runs."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from tests.conftest import fill_, relative_error
from torch import Tensor

from gobelin.denoiser import Denoiser
from gobelin.errors import UsageError
from gobelin.guidance import (
    ConditionedUNet,
    Guidance,
    Predictions,
    adaptive_projected_guidance,
    cfg_zero_star,
    classifier_free_guidance,
    guidance_interval,
    perturbed_attention_guidance,
    rescale_guidance,
)
from gobelin.schedule import NoiseSchedule, PredictionType, ScheduleConfig
from gobelin.text_conditioning import TextConditioning
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

LATENTS = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
TEXT, NEGATIVE = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(1))
ALPHA = 0.36


def small_unet() -> UNet:
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
def unet() -> UNet:
    return small_unet()


@pytest.fixture
def rows(unet: UNet) -> list[int]:
    """How many rows each run of the U-Net predicted, in order."""
    seen = []
    unet.register_forward_hook(lambda _, inputs, prediction: seen.append(len(prediction)))
    return seen


def network(unet: UNet, prediction_type: PredictionType = "v_prediction", dtype=torch.float32) -> ConditionedUNet:
    return ConditionedUNet(
        unet=unet,
        schedule=NoiseSchedule(ScheduleConfig(prediction_type=prediction_type)),
        positive=TextConditioning(embeddings=TEXT.to(dtype)),
        negative=TextConditioning(embeddings=NEGATIVE.to(dtype)),
    )


@torch.no_grad()
def guided(unet: UNet, guidance: Guidance, timestep: float = 400.5, kind: PredictionType = "v_prediction") -> Tensor:
    return guidance(
        Predictions(
            network=network(unet, kind), noisy_latents=LATENTS, timestep=timestep, alpha_cumprod=ALPHA, memory={}
        )
    )


@torch.no_grad()
def predictions(unet: UNet, timestep: float = 400.5) -> tuple[Tensor, Tensor]:
    timesteps = torch.full((3,), timestep)
    return unet(LATENTS, timesteps, NEGATIVE), unet(LATENTS, timesteps, TEXT)


class Fixed(Predictions):
    """Predictions that are given, and not a network's."""

    def __init__(self, negative: Tensor, positive: Tensor, kind: PredictionType, memory: dict | None = None) -> None:
        config = UNetConfig.of(8, attention=(False,), layers_per_block=1, cross_attention_dim=6, norm_num_groups=4)
        super().__init__(
            network=network(UNet(config), kind),
            noisy_latents=LATENTS,
            timestep=400.0,
            alpha_cumprod=ALPHA,
            memory={} if memory is None else memory,
        )
        self._negative, self._positive = negative, positive


@pytest.mark.parametrize(("scale", "rescale"), [(1.5, 0.0), (7.5, 0.0), (7.5, 0.7), (4.0, 1.0)])
def test_guidance_pulls_the_prediction_away_from_the_negative_one(
    unet: UNet, rows: list[int], scale: float, rescale: float
) -> None:
    negative, positive = predictions(unet, 400.5)
    expected = negative + scale * (positive - negative)
    if rescale:
        expected = rescale_noise_cfg(expected, positive, rescale)
    rows.clear()
    output = Denoiser(network=network(unet), guidance=classifier_free_guidance(scale, rescale))(LATENTS, 400.5, ALPHA)
    assert rows == [6]
    assert relative_error(output.denoised, 0.6 * LATENTS - 0.8 * expected) < 1e-5
    assert relative_error(output.noise, 0.6 * expected + 0.8 * LATENTS) < 1e-5
    assert output.latents is LATENTS
    assert output.maps == {}
    assert not output.denoised.requires_grad


@pytest.mark.parametrize("scale", [1.0, 0.0, -3.0])
def test_guidance_of_one_or_less_runs_the_text_alone_and_once(unet: UNet, rows: list[int], scale: float) -> None:
    _, positive = predictions(unet, 17.0)
    rows.clear()
    guess = Denoiser(network=network(unet), guidance=classifier_free_guidance(scale, 0.5))(LATENTS, 17.0, ALPHA)
    assert rows == [3]
    assert relative_error(guess.denoised, 0.6 * LATENTS - 0.8 * positive) < 1e-6
    assert relative_error(guess.noise, 0.6 * positive + 0.8 * LATENTS) < 1e-6


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaling_is_diffusers(rescale: float) -> None:
    guided, positive = 5 * torch.randn(3, 4, 6, 6) + 1, torch.randn(3, 4, 6, 6)
    expected = rescale_noise_cfg(guided, positive, rescale)
    assert relative_error(rescale_guidance(guided, positive, rescale), expected) < 1e-6


def test_predictions_are_computed_once_and_only_when_asked_for(unet: UNet, rows: list[int]) -> None:
    asked = Predictions(network=network(unet), noisy_latents=LATENTS, timestep=9.0, alpha_cumprod=ALPHA)
    assert rows == []
    with torch.no_grad():
        asked.positive()
        asked.positive()
        assert rows == [3]
        negative, positive = asked.both()
    assert rows == [3, 6]
    assert asked.positive() is positive
    assert asked.both()[0] is negative


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_adaptive_projected_guidance_without_its_changes_is_classifier_free_guidance(
    unet: UNet, kind: PredictionType
) -> None:
    plain = guided(unet, classifier_free_guidance(6.0), kind=kind)
    apg = adaptive_projected_guidance(6.0, parallel=1.0, norm=torch.inf, momentum=0.0)
    assert relative_error(guided(unet, apg, kind=kind), plain) < 1e-5
    changed = adaptive_projected_guidance(6.0, parallel=0.0, norm=torch.inf, momentum=0.0)
    assert relative_error(guided(unet, changed, kind=kind), plain) > 1e-3


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_adaptive_projected_guidance_is_the_papers_algorithm(kind: PredictionType) -> None:
    """Algorithm 1 in clean latents, over two steps whose momentum is carried, each image by itself."""
    memory: dict = {}
    guide = adaptive_projected_guidance(5.0, parallel=0.2, norm=0.7, momentum=-0.5)
    running = torch.zeros_like(LATENTS)
    for seed in (3, 4):
        negative, positive = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
        asked = Fixed(negative, positive, kind, memory)
        clean = asked.denoised(positive)
        running = clean - asked.denoised(negative) - 0.5 * running
        expected = []
        for row in range(3):
            difference, direction = running[row].flatten().double(), clean[row].flatten().double()
            difference = difference * min(1.0, 0.7 / difference.norm().item())
            along = (difference @ direction) / (direction @ direction) * direction
            moved = direction + 4.0 * (difference - along + 0.2 * along)
            expected.append(moved.reshape(4, 4, 4))
        found = asked.denoised(guide(asked))
        assert relative_error(found, torch.stack(expected).float()) < 1e-5


@torch.no_grad()
def test_cfg_zero_star_fits_the_negative_prediction_to_the_positive_one() -> None:
    negative, positive = torch.randn(2, 3, 4, 4, 4)
    found = cfg_zero_star(3.0)(Fixed(negative, positive, "epsilon"))
    for row in range(3):
        fit = torch.linalg.lstsq(negative[row].reshape(-1, 1), positive[row].reshape(-1, 1)).solution.item()
        expected = (1 - 3.0) * fit * negative[row] + 3.0 * positive[row]
        assert relative_error(found[row], expected) < 1e-5
    same = Fixed(2 * positive, positive, "epsilon")
    assert relative_error(cfg_zero_star(9.0)(same), positive) < 1e-5, "a fitted negative has nothing to push from"
    zero = cfg_zero_star(2.0)(Fixed(torch.zeros_like(positive), positive, "epsilon"))
    assert torch.equal(zero, 2 * positive)


def test_an_interval_is_guidance_inside_and_the_prompt_alone_outside(unet: UNet, rows: list[int]) -> None:
    whole = guidance_interval(classifier_free_guidance(4.0), 0.0, 1.0)
    part = guidance_interval(classifier_free_guidance(4.0), 0.25, 0.75)
    for timestep in (999.0, 700.0, 500.0, 300.0, 100.0, 0.0):
        plain = guided(unet, classifier_free_guidance(4.0), timestep)
        assert torch.equal(guided(unet, whole, timestep), plain)
        rows.clear()
        found = guided(unet, part, timestep)
        inside = 0.25 <= 1 - timestep / 999 < 0.75
        assert rows == ([6] if inside else [3])
        assert torch.equal(found, plain) == inside


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.4), (-0.1, 1), (0, 1.1), (float("nan"), 1)])
def test_an_interval_that_is_none_is_refused(start: float, end: float) -> None:
    with pytest.raises(UsageError, match="the guidance interval is"):
        guidance_interval(classifier_free_guidance(2.0), start, end)


def test_perturbed_attention_guidance_of_no_scale_is_the_guidance_that_it_wraps(unet: UNet) -> None:
    plain = classifier_free_guidance(3.0)
    assert torch.equal(guided(unet, perturbed_attention_guidance(plain, scale=0.0)), guided(unet, plain))


@torch.no_grad()
def test_perturbed_attention_guidance_goes_away_from_patches_that_see_only_themselves(unet: UNet) -> None:
    site = next(site for site in unet.attention_sites if site.kind == "self" and site.name.startswith("mid_block"))
    _, positive = predictions(unet)
    attention = unet.get_submodule(site.name)
    ordinary = attention.forward

    def only_themselves(hidden: Tensor, *others: object, **named: object) -> Tensor:
        return attention.to_out[0](attention.to_v(hidden))

    attention.forward = only_themselves
    _, perturbed = predictions(unet)
    attention.forward = ordinary
    assert not torch.allclose(perturbed, positive)
    found = guided(unet, perturbed_attention_guidance(classifier_free_guidance(1.0), scale=2.5))
    assert relative_error(found, positive + 2.5 * (positive - perturbed)) < 1e-5


def test_perturbed_attention_guidance_refuses_sites_that_see_words(unet: UNet) -> None:
    with pytest.raises(UsageError, match=r"is for self-attention, and mid_block.* sees words"):
        guided(unet, perturbed_attention_guidance(classifier_free_guidance(2.0), sites="mid_block*attn2"))
    with pytest.raises(UsageError, match="matches no attention"):
        guided(unet, perturbed_attention_guidance(classifier_free_guidance(2.0), sites="nowhere*"))
