"""U-Net, schedule and guidance as one callable: noisy latents in, a guess at the clean latents out."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.schedule import NoiseSchedule
from gobelin.unet import UNet


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A U-Net that knows what it is asked to paint, and how hard to be pulled towards it.

    ``text_embeddings`` and ``negative_embeddings`` are [B, L, D]; ``guidance`` 1 or less turns guidance off, and
    then the negative half is not run. ``guidance_rescale`` is φ of arXiv 2305.08891, 0 (off) to 1.
    """

    unet: UNet
    schedule: NoiseSchedule
    text_embeddings: Float[Tensor, "batch length width"]
    negative_embeddings: Float[Tensor, "batch length width"]
    guidance: float = 7.5
    guidance_rescale: float = 0.0

    @torch.no_grad()
    def __call__(
        self, noisy_latents: Float[Tensor, "batch channels h w"], timestep: float, alpha_cumprod: float
    ) -> tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch channels h w"]]:
        """The (denoised latents, noise) in ``noisy_latents``, which stand at ``timestep`` and noise level ᾱ."""
        prediction = self._predict(noisy_latents.to(self.unet.dtype), timestep).to(noisy_latents.dtype)
        return self.schedule.split(prediction, noisy_latents, alpha_cumprod)

    def _predict(self, noisy_latents: Tensor, timestep: float) -> Tensor:
        timesteps = torch.full((len(noisy_latents),), timestep, dtype=torch.float32, device=noisy_latents.device)
        if self.guidance <= 1:
            return self.unet(noisy_latents, timesteps, self.text_embeddings)
        both = torch.cat([self.negative_embeddings, self.text_embeddings])
        negative, positive = self.unet(noisy_latents.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
        guided = negative + self.guidance * (positive - negative)
        return rescale_guidance(guided, positive, self.guidance_rescale)


def rescale_guidance(
    guided: Float[Tensor, "batch channels h w"], positive: Float[Tensor, "batch channels h w"], rescale: float
) -> Float[Tensor, "batch channels h w"]:
    """Give a guided prediction back some of the spread of the unguided one (arXiv 2305.08891, section 3.4)."""
    if not rescale:
        return guided
    spread = positive.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return guided * (rescale * spread + 1 - rescale)
