"""The denoiser: U-Net, schedule and guidance as one callable that a sampler asks at each step."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from gobelin.errors import UsageError
from gobelin.guidance import ConditionedUNet, Guidance, Predictions
from gobelin.samplers import DenoiserOutput
from gobelin.types import Latents
from gobelin.validation import shown


@runtime_checkable
class ComposableDenoiser(Protocol):
    """A denoiser, or a wrapper around one that moves latents before it sees them.

    Samplers call it at each step; ``finish`` gets the last latents, which nothing sees any more, so that a wrapper can
    do there what it does between steps.
    """

    def __call__(self, latents: Latents, timestep: float, alpha_cumprod: float) -> DenoiserOutput: ...

    def finish(self, latents: Latents) -> Latents: ...


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """Predict with a conditioned U-Net and a guidance, and split noisy latents into clean ones and noise."""

    network: ConditionedUNet
    guidance: Guidance
    memory: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, latents: Latents, timestep: float, alpha_cumprod: float) -> DenoiserOutput:
        """Denoise latents that stand at ``timestep`` and noise level ᾱ."""
        predictions = Predictions(
            network=self.network,
            noisy_latents=latents,
            timestep=timestep,
            alpha_cumprod=alpha_cumprod,
            memory=self.memory,
        )
        prediction = self.guidance(predictions)
        if not isinstance(prediction, torch.Tensor) or prediction.shape != latents.shape:
            what = list(prediction.shape) if isinstance(prediction, torch.Tensor) else shown(prediction)
            raise UsageError(f"the guidance returned {what}: expected a prediction of {list(latents.shape)}")
        prediction = prediction.to(latents.dtype)
        denoised, noise = self.network.schedule.split(prediction, latents, alpha_cumprod)
        return DenoiserOutput(latents=latents, denoised=denoised, noise=noise, maps=predictions.maps)

    def finish(self, latents: Latents) -> Latents:
        """Return the last latents as they are."""
        return latents
