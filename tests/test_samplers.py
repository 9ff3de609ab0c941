"""Every sampler against diffusers' scheduler of the same name, step for step, on the same noise."""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
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
from PIL import Image
from tests.conftest import relative_error
from tests.schedulers import SCHEDULERS, ZERO_TERMINAL_SNR
from torch import Tensor

from gobelin.cli.main import main
from gobelin.errors import UsageError
from gobelin.formats.generation_info.a1111 import parse_a1111_parameters
from gobelin.formats.png import read_png_settings
from gobelin.pipeline import Pipeline
from gobelin.samplers import (
    SAMPLERS,
    Denoise,
    DenoiserOutput,
    DrawNoise,
    NoiseLevels,
    NoiseSource,
    Sampler,
    Step,
    find_noise_levels,
    img2img_levels,
    sample_latents,
)
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.training import find_preset
from gobelin.training.config import SamplingConfig

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
WITH_TWO_CALLS = (PNDMScheduler, *TWO_CALLS)
SIGMA_SPACE = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LMSDiscreteScheduler, *TWO_CALLS)
# diffusers adds up x = z_0 + σ·ε in float32, and with few steps the last ones lose z_0's last digits.
TOLERANCES = {"dpm_2_ancestral": 1e-4, "dpm_2_ancestral_karras": 1e-4}

START = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
MIXING = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 0.3


def every_case(names: Iterable[str], prediction_types: Iterable[str]) -> pytest.MarkDecorator:
    """Every sampler with every prediction type, spacing and number of steps.

    For each sampler, every number of steps and every pair of the other two stand in one test or more that is not slow.
    """
    kinds = list(product(prediction_types, SPACINGS))
    cases = [
        pytest.param(name, *kind, steps, marks=[] if (row + column - place) % len(kinds) == 0 else pytest.mark.slow)
        for (row, name), (column, steps), (place, kind) in product(*map(enumerate, (names, STEPS, kinds)))
    ]
    return pytest.mark.parametrize(("name", "prediction_type", "spacing", "steps"), cases)


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
    """(timestep, latents after the step, denoised latents) of each step, variance preserving as ours.

    Where a step has two calls, it is taken at the second, and its denoised latents are not compared.
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
        denoised = None if second_half or twice else getattr(output, "pred_original_sample", None)
        yield began if second_half else timestep.item(), latents / scale, denoised
        began = 0.0


def assert_same(steps: list[Step], expected: list[tuple[float, Tensor, Tensor | None]], tolerance: float) -> None:
    assert len(steps) == len(expected)
    for index, (step, (timestep, latents, denoised)) in enumerate(zip(steps, expected, strict=True)):
        assert step.index == index
        assert step.timestep == pytest.approx(timestep, rel=1e-5)
        assert relative_error(step.latents, latents.to(step.latents.dtype)) < tolerance
        if denoised is not None:
            assert relative_error(step.denoised, denoised.to(step.latents.dtype)) < tolerance


@every_case(SCHEDULERS, ("epsilon", "v_prediction"))
def test_every_step_is_diffusers(
    name: str, prediction_type: Any, spacing: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ScheduleConfig(prediction_type=prediction_type, timestep_spacing=spacing)
    expected = list(theirs(scheduler_of(name, config, steps), monkeypatch))
    assert_same(ours(name, config, steps), expected, TOLERANCES.get(name, 1e-5))


@every_case(ZERO_TERMINAL_SNR, ("v_prediction",))
def test_every_step_is_diffusers_with_zero_terminal_snr(
    name: str, prediction_type: Any, spacing: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ScheduleConfig(prediction_type=prediction_type, rescale_betas_zero_snr=True, timestep_spacing=spacing)
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


@every_case(EULERS, ("v_prediction",))
def test_every_euler_step_is_the_exact_one_with_zero_terminal_snr(
    name: str, prediction_type: Any, spacing: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """σ starts at 4096 here, and diffusers, which adds up x = z_0 + σ·ε in float32, loses z_0's last digits."""
    config = ScheduleConfig(prediction_type=prediction_type, rescale_betas_zero_snr=True, timestep_spacing=spacing)
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


@pytest.mark.parametrize("offset", [pytest.param(0, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_steps_offset_moves_leading_timesteps(name: str, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not issubclass(SCHEDULERS[name][0], WITH_TWO_CALLS)])
def test_a_sampler_goes_on_from_the_latents_that_its_denoiser_saw(name: str) -> None:
    schedule = NoiseSchedule(ScheduleConfig(timestep_spacing="trailing"))
    plain, moved = denoiser(schedule), torch.full_like(START, 0.1)

    def moving(latents: Tensor, timestep: float, alpha_cumprod: float) -> DenoiserOutput:
        return plain(latents + moved, timestep, alpha_cumprod)

    levels = find_noise_levels(name, schedule, 6)
    starts = ((moving, START), (plain, START + moved / levels.start_scale))
    first, other = (next(iter(sample_latents(name, denoise, levels, start, noises()))) for denoise, start in starts)
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


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_a_number_of_steps_that_the_schedule_lacks_is_refused(steps: int) -> None:
    for name in SAMPLERS:
        with pytest.raises(UsageError, match=f"{steps} steps asked for: give a number from 1 to 1000"):
            ours(name, ScheduleConfig(), steps)


def test_img2img_goes_through_the_last_share_of_the_steps() -> None:
    for name in SAMPLERS:
        levels = find_noise_levels(name, NoiseSchedule(), 10)
        assert levels.steps == 10
        cut = img2img_levels(levels, 10, 0.35)
        assert type(cut) is type(levels)
        assert cut.steps == 3
        assert list(cut.intervals())[-1][1:] == list(levels.intervals())[-1][1:]
        assert img2img_levels(levels, 10, 1.0).timesteps == levels.timesteps


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (1.01, "the strength is 1.01: give a number from 0"),
        (-0.1, "the strength is -0.1: give a number from 0"),
        (0.09, "a strength of 0.09 leaves none of 10 steps: give 0.1 or more"),
    ],
)
def test_a_strength_that_leaves_no_step_is_refused(strength: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        img2img_levels(find_noise_levels("ddim", NoiseSchedule(), 10), 10, strength)


def test_a_sampler_of_ones_own_is_one_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In calls, over an init image, in a training run's recommendation, on the command line and in PNGs."""
    calls = []

    def mine(denoise: Denoise, latents: Tensor, levels: NoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
        calls.append(levels.steps)
        yield from SAMPLERS["ddim"].function(denoise, latents, levels, draw_noise)

    entry = Sampler(function=mine, levels=SAMPLERS["ddim"].levels, spacing=SAMPLERS["ddim"].spacing)
    monkeypatch.setitem(SAMPLERS, "mine", entry)
    pipe = Pipeline.from_pretrained()
    result = pipe("a red circle", sampler="mine", steps=4, seed=3)
    assert torch.equal(result.latents, pipe("a red circle", sampler="ddim", steps=4, seed=3).latents)
    pipe("a red circle", sampler="mine", steps=4, init_image=result.images[0], strength=0.5)
    assert calls == [4, 2]
    replace(find_preset("nano"), recommended=SamplingConfig(sampler="mine"))

    options = ("--seed", "3", "--out")
    main(["generate", "a red circle", "--sampler", "mine", "--steps", "4", *options, str(tmp_path / "painted")])
    (painted,) = map(Path, capsys.readouterr().out.split())
    assert read_png_settings(painted)["sampler"] == "mine"
    assert np.array_equal(Image.open(painted), result.images[0])
    assert parse_a1111_parameters(Image.open(painted).info["parameters"], SAMPLERS).settings["sampler"] == "mine"
    main(["generate", "--from", str(painted), *options, str(tmp_path / "again")])
    (again,) = map(Path, capsys.readouterr().out.split())
    assert np.array_equal(Image.open(again), Image.open(painted))
    assert calls == [4, 2, 4, 4]


def test_an_image_gets_the_same_noise_alone_and_in_a_batch() -> None:
    def source(*seeds: int) -> NoiseSource:
        return NoiseSource([torch.Generator().manual_seed(seed) for seed in seeds], (4, 3, 5))

    batch, alone = source(5, 6, 7), source(6)
    for _ in range(3):
        drawn, single = batch(), alone()
        assert drawn.shape == (3, 4, 3, 5)
        assert torch.equal(drawn[1], single[0])
        assert not torch.equal(drawn[0], drawn[1])
