"""The noise schedule: a table of ᾱ_t, and the conversions that follow from it.

z_t = √ᾱ_t · z_0 + √(1 − ᾱ_t) · ε, with ᾱ_t = ∏ (1 − β_s), the cumulative product (Ho et al. 2020, equation 4).
Latents in this "variance preserving" form are what the U-Net sees and what samplers pass on.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval
from jaxtyping import Float, Int
from torch import Tensor

from gobelin.errors import UsageError
from gobelin.validation import validate_fields

PredictionType = Literal["epsilon", "v_prediction"]
Spacing = Literal["leading", "linspace", "trailing"]

# Put by σ-space samplers where zero terminal SNR makes ᾱ 0, so that σ stays finite: 4096, as in diffusers.
TINY_ALPHA_CUMPROD = 2.0**-24
_MOST_TIMESTEPS = 100_000  # a config file's number is believed up to here, so that a wrong one takes no memory


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The configuration of a noise schedule; fields as in a diffusers ``scheduler/scheduler_config.json``.

    The defaults are Stable Diffusion 1.5's. ``timestep_spacing`` None leaves the choice to the sampler. Raises
    :class:`UsageError` for values that make no schedule.
    """

    num_train_timesteps: Annotated[int, Interval(ge=2, le=_MOST_TIMESTEPS)] = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    prediction_type: PredictionType = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: Spacing | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    fixed: ClassVar[dict[str, Any]] = {"clip_sample": False, "thresholding": False, "trained_betas": None}

    def __post_init__(self) -> None:
        validate_fields(self)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UsageError(
                f"beta_start is {self.beta_start} and beta_end {self.beta_end}: give two numbers between 0 and 1, the "
                "smaller first"
            )
        if not 0 <= self.steps_offset < self.num_train_timesteps:
            raise UsageError(
                f"steps_offset is {self.steps_offset}: give a number from 0 to {self.num_train_timesteps - 1}"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UsageError(
                "rescale_betas_zero_snr needs prediction_type v_prediction: at the last timestep ε says nothing"
            )

    @classmethod
    def sd15(cls) -> "ScheduleConfig":
        """Configure Stable Diffusion 1.5's schedule: ε-prediction over scaled-linear betas."""
        return cls()

    @classmethod
    def zero_terminal_snr(cls) -> "ScheduleConfig":
        """Configure zero terminal SNR, for training from scratch: v-prediction, and pure noise at the last timestep.

        Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891).
        """
        return cls(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


class NoiseSchedule:
    """The noise schedule: ᾱ_t, and the conversions between latents, noise, velocity and prediction.

    ``timesteps`` are whole numbers in 0 … 999; latents, noise and velocity are [B, C, h, w].
    """

    def __init__(self, config: ScheduleConfig | None = None):
        self.config = config or ScheduleConfig.sd15()
        self.alphas_cumprod: Float[Tensor, " timesteps"] = _compute_alphas_cumprod(self.config)

    @property
    def prediction_type(self) -> PredictionType:
        """The kind of the U-Net's prediction: "epsilon", the noise, or "v_prediction", the velocity."""
        return self.config.prediction_type

    def add_noise(
        self,
        latents: Float[Tensor, "batch channels h w"],
        noise: Float[Tensor, "batch channels h w"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels h w"]:
        """Add noise: z_t = √ᾱ_t · z_0 + √(1 − ᾱ_t) · ε (Ho et al. 2020, equation 4)."""
        signal, sigma = self._rates(latents, timesteps)
        return signal * latents + sigma * noise

    def velocity(
        self,
        latents: Float[Tensor, "batch channels h w"],
        noise: Float[Tensor, "batch channels h w"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels h w"]:
        """Compute the velocity, √ᾱ_t · ε − √(1 − ᾱ_t) · z_0 (Salimans and Ho 2022, arXiv 2202.00512, appendix D)."""
        signal, sigma = self._rates(latents, timesteps)
        return signal * noise - sigma * latents

    def target(
        self,
        latents: Float[Tensor, "batch channels h w"],
        noise: Float[Tensor, "batch channels h w"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels h w"]:
        """Choose the training target: the noise or the velocity, by the prediction type."""
        return noise if self.prediction_type == "epsilon" else self.velocity(latents, noise, timesteps)

    def split(
        self,
        prediction: Float[Tensor, "batch channels h w"],
        noisy_latents: Float[Tensor, "batch channels h w"],
        alpha_cumprod: float,
    ) -> tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch channels h w"]]:
        """Split noisy latents at noise level ᾱ, by the U-Net's prediction, into denoised latents ẑ_0 and noise ε̂.

        ẑ_0 is infinite for ε-prediction at ᾱ = 0, which a :class:`ScheduleConfig` rules out.
        """
        signal, sigma = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
        if self.prediction_type == "epsilon":
            return (noisy_latents - sigma * prediction) / signal, prediction
        return signal * noisy_latents - sigma * prediction, signal * prediction + sigma * noisy_latents

    def denoised_slope(self, alpha_cumprod: float) -> float:
        """Compute ∂ẑ_0/∂prediction at noise level ᾱ: :meth:`split` is linear in the prediction."""
        slope = -((1 - alpha_cumprod) ** 0.5)
        return slope / alpha_cumprod**0.5 if self.prediction_type == "epsilon" else slope

    def progress(self, timestep: float) -> float:
        """Compute the share of the way from noise (0) to image (1) at which a timestep stands."""
        return 1 - timestep / (self.config.num_train_timesteps - 1)

    def _rates(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Look up (√ᾱ_t, √(1 − ᾱ_t)), each [B, 1, 1, 1], on the latents' device and in their precision."""
        alphas = self.alphas_cumprod.to(latents.device)[timesteps].to(latents.dtype)[:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()


def _compute_alphas_cumprod(config: ScheduleConfig) -> Float[Tensor, " timesteps"]:
    """Compute ᾱ_t for every training timestep, in float32 as every implementation keeps it."""
    count = config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, count, dtype=torch.float32)
    else:
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, count, dtype=torch.float32) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    return _rescale_to_zero_terminal_snr(alphas) if config.rescale_betas_zero_snr else alphas


def _rescale_to_zero_terminal_snr(alphas: Float[Tensor, " timesteps"]) -> Float[Tensor, " timesteps"]:
    """Shift and scale √ᾱ so that the last is 0 and the first stays (arXiv 2305.08891, algorithm 1).

    It goes through the betas, as diffusers does, so that rounding is the same.
    """
    signal = alphas.sqrt()
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    rescaled = signal**2
    ratios = torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]])
    return torch.cumprod(1 - (1 - ratios), dim=0)
