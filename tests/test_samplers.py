"""Every sampler against diffusers' scheduler of the same name, step for step, on the same noise."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from tests.conftest import relative_error
from tests.schedulers import SCHEDULERS, ZERO_TERMINAL_SNR
from torch import Tensor

from gobelin.errors import UsageError
from gobelin.samplers import SAMPLERS, Denoise, DenoiserOutput, NoiseSource, Step, find_noise_levels, sample_latents
from gobelin.schedule import NoiseSchedule, ScheduleConfig

SPACINGS = ("leading", "linspace", "trailing")
STEPS = (1, 2, 7, 20, 30, 50)
STOCHASTIC = (
    "ddpm",
    "lcm",
    "euler_ancestral",
    "dpm_2_ancestral",
    "dpm_2_ancestral_karras",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
)
EULERS = ("euler", "euler_karras", "euler_ancestral")
TWO_CALLS = (HeunDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)
ASK_TWICE = (PNDMScheduler, *TWO_CALLS)
SIGMA_SPACE = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LMSDiscreteScheduler, *TWO_CALLS)
# diffusers adds up x = z_0 + σ·ε in float32, and with few steps the last ones lose z_0's last digits.
TOLERANCES = {"dpm_2_ancestral": 1e-4, "dpm_2_ancestral_karras": 1e-4}

START = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
MIXING = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 0.3

on_every_grid = pytest.mark.parametrize(("spacing", "steps"), list(product(SPACINGS, STEPS)))


def toy_model(latents: Tensor, timestep: float) -> Tensor:
    """What a U-Net's prediction might be: not linear, and mixed over the channels."""
    mixed = torch.einsum("ij,bjhw->bihw", MIXING.to(latents.dtype), latents)
    return torch.tanh(mixed + latents * 0.5 + timestep / 1000 * 0.3)


def noises() -> Callable[[], Tensor]:
    """The same noise, in the same order, at every call of this function."""
    generator = torch.Generator().manual_seed(2)
    return lambda: torch.randn(START.shape, generator=generator)


def denoiser(schedule: NoiseSchedule) -> Denoise:
    """The toy model as a sampler calls it."""

    def denoise(latents: Tensor, timestep: float, alpha_cumprod: float) -> DenoiserOutput:
        denoised, noise = schedule.split(toy_model(latents, timestep), latents, alpha_cumprod)
        return DenoiserOutput(latents=latents, denoised=denoised, noise=noise)

    return denoise


def ours(name: str, config: ScheduleConfig, steps: int) -> list[Step]:
    schedule = NoiseSchedule(config)
    return list(sample_latents(name, denoiser(schedule), find_noise_levels(name, schedule, steps), START, noises()))


def scheduler_of(name: str, config: ScheduleConfig, steps: int) -> Any:
    cls, options = SCHEDULERS[name]
    signature = inspect.signature(cls).parameters
    rescale = {"rescale_betas_zero_snr": config.rescale_betas_zero_snr} if "rescale_betas_zero_snr" in signature else {}
    scheduler = cls(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
        steps_offset=config.steps_offset,
        **options,
        **rescale,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def theirs(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[float, Tensor, Tensor | None]]:
    """(timestep, latents after the step, guess at the clean latents) of each step, variance preserving as ours.

    Where a step asks twice, it is at its end, and the guess is not looked at.
    """
    noise = noises()
    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, **__: noise(), raising=False
    )
    latents = START * scheduler.init_noise_sigma
    began, calls = 0.0, len(scheduler.timesteps)
    twice = isinstance(scheduler, TWO_CALLS)
    for index, timestep in enumerate(scheduler.timesteps):
        prediction = toy_model(scheduler.scale_model_input(latents, timestep), timestep.item())
        output = scheduler.step(prediction, timestep, latents)
        latents = output.prev_sample
        scale = (scheduler.sigmas[index + 1] ** 2 + 1) ** 0.5 if isinstance(scheduler, SIGMA_SPACE) else 1.0
        first_half = calls > 1 and ((twice and index % 2 == 0) or (isinstance(scheduler, PNDMScheduler) and index == 0))
        if first_half and index < calls - 1:
            began = timestep.item()
            continue
        second_half = began and (twice or index == 1) and index % 2
        guess = None if second_half or twice else getattr(output, "pred_original_sample", None)
        yield began if second_half else timestep.item(), latents / scale, guess
        began = 0.0


def assert_same(steps: list[Step], expected: list[tuple[float, Tensor, Tensor | None]], tolerance: float) -> None:
    assert len(steps) == len(expected)
    for index, (step, (timestep, latents, denoised)) in enumerate(zip(steps, expected, strict=True)):
        assert step.index == index
        assert step.timestep == pytest.approx(timestep, rel=1e-5)
        assert relative_error(step.latents, latents.to(step.latents.dtype)) < tolerance
        if denoised is not None:
            assert relative_error(step.denoised, denoised.to(step.latents.dtype)) < tolerance


@on_every_grid
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_is_diffusers(
    name: str, prediction_type: Any, spacing: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ScheduleConfig(prediction_type=prediction_type, timestep_spacing=spacing)
    expected = list(theirs(scheduler_of(name, config, steps), monkeypatch))
    assert_same(ours(name, config, steps), expected, TOLERANCES.get(name, 1e-5))


@on_every_grid
@pytest.mark.parametrize("name", ZERO_TERMINAL_SNR)
def test_every_step_is_diffusers_with_zero_terminal_snr(
    name: str, spacing: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing=spacing)
    scheduler = scheduler_of(name, config, steps)
    if name == "dpmpp_2m_karras" and steps >= 30:
        # Karras' first two σ round to one timestep, and diffusers, which looks the step up by its timestep, skips one.
        with pytest.raises(IndexError):
            list(theirs(scheduler, monkeypatch))
        return
    assert_same(ours(name, config, steps), list(theirs(scheduler, monkeypatch)), tolerance=1e-5)


def sigma_space(scheduler: Any, ancestral: bool) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Euler's formulas as Karras et al. and k-diffusion write them, in float64: x = z_0 + σ·ε, and v-prediction."""
    noise = noises()
    x = START.double() * float(scheduler.init_noise_sigma)
    sigmas = scheduler.sigmas.double().tolist()
    for timestep, sigma, next_sigma in zip(scheduler.timesteps.tolist(), sigmas, sigmas[1:], strict=False):
        velocity = toy_model(x / math.sqrt(sigma**2 + 1), timestep)
        denoised = x / (sigma**2 + 1) - velocity * sigma / math.sqrt(sigma**2 + 1)
        slope = (x - denoised) / sigma
        up = math.sqrt(next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2) if ancestral else 0.0
        down = math.sqrt(next_sigma**2 - up**2)
        x = x + (down - sigma) * slope + up * noise().double()
        yield timestep, x / math.sqrt(next_sigma**2 + 1), denoised


@on_every_grid
@pytest.mark.parametrize("name", EULERS)
def test_every_euler_step_is_the_exact_one_with_zero_terminal_snr(
    name: str, spacing: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """σ starts at 4096 here, and diffusers, which adds up x = z_0 + σ·ε in float32, loses z_0's last digits."""
    config = ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing=spacing)
    steps_here = ours(name, config, steps)
    exact = list(sigma_space(scheduler_of(name, config, steps), ancestral=name == "euler_ancestral"))
    assert_same(steps_here, exact, tolerance=1e-5)
    rounded = list(theirs(scheduler_of(name, config, steps), monkeypatch))
    assert_same(steps_here, rounded, tolerance=4 * 4096 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_ends_at_the_first_noise_level_unless_told_to_end_at_none(
    to_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEDULERS["ddim"][1], "set_alpha_to_one", to_one)
    config = ScheduleConfig(set_alpha_to_one=to_one, timestep_spacing="leading")
    steps = ours("ddim", config, 5)
    assert_same(steps, list(theirs(scheduler_of("ddim", config, 5), monkeypatch)), tolerance=1e-5)
    assert torch.equal(steps[-1].latents, steps[-1].denoised) == to_one


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_steps_offset_moves_the_leading_grid(name: str, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScheduleConfig(timestep_spacing="leading", steps_offset=offset)
    assert_same(ours(name, config, 8), list(theirs(scheduler_of(name, config, 8), monkeypatch)), tolerance=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_silent_configuration_leaves_the_spacing_that_diffusers_would_take(name: str) -> None:
    default = SCHEDULERS[name][0]().config.timestep_spacing
    assert SAMPLERS[name].spacing == default
    silent, explicit = ours(name, ScheduleConfig(), 6), ours(name, ScheduleConfig(timestep_spacing=default), 6)
    assert torch.equal(silent[-1].latents, explicit[-1].latents)


def test_every_sampler_is_compared() -> None:
    assert SCHEDULERS.keys() == SAMPLERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_only_stochastic_samplers_draw_noise_and_none_draws_it_for_the_last_step(name: str) -> None:
    drawn = []
    schedule = NoiseSchedule(ScheduleConfig(timestep_spacing="trailing"))

    def noise() -> Tensor:
        drawn.append(1)
        return torch.randn(START.shape)

    list(sample_latents(name, denoiser(schedule), find_noise_levels(name, schedule, 6), START, noise))
    assert len(drawn) == (5 if name in STOCHASTIC else 0)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not issubclass(SCHEDULERS[name][0], ASK_TWICE)])
def test_a_sampler_goes_on_from_the_latents_that_its_denoiser_saw(name: str) -> None:
    schedule = NoiseSchedule(ScheduleConfig(timestep_spacing="trailing"))
    plain, moved = denoiser(schedule), torch.full_like(START, 0.1)

    def moving(latents: Tensor, timestep: float, alpha_cumprod: float) -> DenoiserOutput:
        return plain(latents + moved, timestep, alpha_cumprod)

    grid = find_noise_levels(name, schedule, 6)
    starts = ((moving, START), (plain, START + moved / grid.start_scale))
    first, other = (next(iter(sample_latents(name, denoise, grid, start, noises()))) for denoise, start in starts)
    assert relative_error(first.latents, other.latents) < 1e-5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_step_reports_the_noise_level_it_started_from(name: str) -> None:
    sigmas = [step.sigma for step in ours(name, ScheduleConfig(timestep_spacing="trailing"), 6)]
    assert sigmas[0] == pytest.approx(14.6146, abs=1e-4)
    assert sigmas == sorted(sigmas, reverse=True)
    table = NoiseSchedule().alphas_cumprod.double()
    if "karras" not in name and name != "lcm":  # whose timesteps are its own
        assert sigmas[-1] == pytest.approx(((1 - table[166]) / table[166]).sqrt().item(), rel=0.01)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_with_zero_terminal_snr_the_first_sigma_is_infinite(name: str) -> None:
    assert ours(name, ScheduleConfig.zero_terminal_snr(), 3)[0].sigma == math.inf


def test_an_unknown_sampler_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match=f"unknown sampler 'unipcc': the choices are {', '.join(SAMPLERS)}"):
        ours("unipcc", ScheduleConfig(), 5)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_a_number_of_steps_that_the_schedule_lacks_is_refused(name: str, steps: int) -> None:
    with pytest.raises(UsageError, match=f"{steps} steps asked for: give a number from 1 to 1000"):
        ours(name, ScheduleConfig(), steps)


def test_an_image_gets_the_same_noise_alone_and_in_a_batch() -> None:
    def source(*seeds: int) -> NoiseSource:
        return NoiseSource([torch.Generator().manual_seed(seed) for seed in seeds], (4, 3, 5))

    batch, alone = source(5, 6, 7), source(6)
    for _ in range(3):
        drawn, single = batch(), alone()
        assert drawn.shape == (3, 4, 3, 5)
        assert torch.equal(drawn[1], single[0])
        assert not torch.equal(drawn[0], drawn[1])
