"""The noise schedule against diffusers', and what must hold of its conversions."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import relative_error

from gobelin.errors import UsageError
from gobelin.schedule import NoiseSchedule, ScheduleConfig

CONFIGS = [
    ScheduleConfig(beta_schedule=beta_schedule, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    for beta_schedule in ("scaled_linear", "linear")
    for prediction_type, zero_snr in (("epsilon", False), ("v_prediction", False), ("v_prediction", True))
] + [ScheduleConfig(num_train_timesteps=100, beta_start=0.001, beta_end=0.05)]

every_config = pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))


def twin(config: ScheduleConfig) -> DDPMScheduler:
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    return DDPMScheduler(
        **{name: getattr(config, name) for name in names}, rescale_betas_zero_snr=config.rescale_betas_zero_snr
    )


@every_config
def test_the_table_is_diffusers(config: ScheduleConfig) -> None:
    ours, theirs = NoiseSchedule(config).alphas_cumprod, twin(config).alphas_cumprod
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_sd15_ends_with_a_little_signal() -> None:
    alphas = NoiseSchedule().alphas_cumprod.double()
    sigmas = ((1 - alphas) / alphas).sqrt()
    assert len(alphas) == 1000
    assert alphas[999].item() == pytest.approx(0.0046601, abs=5e-8)
    assert sigmas[0].item() == pytest.approx(0.029167, abs=1e-6)
    assert sigmas[999].item() == pytest.approx(14.6146, abs=5e-5)


def test_zero_terminal_snr_ends_with_none_and_keeps_the_start() -> None:
    config = ScheduleConfig.zero_terminal_snr()
    alphas = NoiseSchedule(config).alphas_cumprod
    assert alphas[-1] == 0
    assert alphas[0].item() == pytest.approx(NoiseSchedule().alphas_cumprod[0].item(), rel=1e-6)
    assert (alphas.diff() < 0).all()
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")


@every_config
def test_noise_and_velocity_are_diffusers(config: ScheduleConfig) -> None:
    schedule, theirs = NoiseSchedule(config), twin(config)
    last = config.num_train_timesteps - 1
    timesteps = torch.tensor([0, 1, last // 2, last])
    latents, noise = torch.randn(4, 4, 3, 5), torch.randn(4, 4, 3, 5)
    noisy, velocity = schedule.add_noise(latents, noise, timesteps), schedule.velocity(latents, noise, timesteps)
    assert relative_error(noisy, theirs.add_noise(latents, noise, timesteps)) < 1e-6
    assert relative_error(velocity, theirs.get_velocity(latents, noise, timesteps)) < 1e-6


def test_zero_terminal_snr_with_epsilon_is_refused() -> None:
    with pytest.raises(UsageError, match="rescale_betas_zero_snr needs prediction_type v_prediction"):
        ScheduleConfig(rescale_betas_zero_snr=True)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_target_is_what_the_prediction_type_says(zero_snr: bool) -> None:
    latents, noise, timesteps = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([10, 999])
    by_noise = NoiseSchedule(ScheduleConfig())
    by_velocity = NoiseSchedule(ScheduleConfig(rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"))
    assert torch.equal(by_noise.target(latents, noise, timesteps), noise)
    velocity = by_velocity.velocity(latents, noise, timesteps)
    assert torch.equal(by_velocity.target(latents, noise, timesteps), velocity)
    assert not torch.allclose(velocity, noise)


@given(timestep=st.integers(0, 999), seed=st.integers(0, 2**32), config=st.sampled_from(CONFIGS[:3]))
def test_split_undoes_noising(timestep: int, seed: int, config: ScheduleConfig) -> None:
    schedule, velocity = NoiseSchedule(config), config.prediction_type == "v_prediction"
    alpha = schedule.alphas_cumprod[timestep].item()
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 1, 4, 3, 3, generator=generator)
    timesteps = torch.tensor([timestep])
    noisy, target = schedule.add_noise(latents, noise, timesteps), schedule.target(latents, noise, timesteps)
    denoised, predicted_noise = schedule.split(target, noisy, alpha)
    torch.testing.assert_close(denoised, latents, rtol=0, atol=1e-5 if velocity else 1e-6 / alpha**0.5 + 1e-6)
    torch.testing.assert_close(predicted_noise, noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("beta_schedule", "cosine", "'scaled_linear', 'linear'"),
        ("prediction_type", "sample", "'epsilon', 'v_prediction'"),
        ("timestep_spacing", "even", "'leading', 'linspace', 'trailing'"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_choices(field: str, value: str, choices: str) -> None:
    with pytest.raises(UsageError, match=f"{field} is '{value}': give one of {choices}"):
        ScheduleConfig(**{field: value})
