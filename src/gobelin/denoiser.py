"""U-Net, schedule and guidance as one callable: noisy latents in, a guess at the clean latents out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.attention import AttentionMaps, Edit, Trace
from gobelin.control.attention_control import Push
from gobelin.control.attention_guidance import Wish
from gobelin.samplers import DenoiserOutput
from gobelin.schedule import NoiseSchedule
from gobelin.unet import UNet


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A U-Net that knows what it is asked to paint, and how hard to be pulled towards it.

    ``text_embeddings`` and ``negative_embeddings`` are [B, L, D]; ``guidance`` 1 or less turns guidance off, and
    then the negative half is not run. ``guidance_rescale`` is φ of arXiv 2305.08891, 0 (off) to 1. ``trace`` and
    ``edits`` concern the half that is guided by the text. Before anything else, latents go through
    ``adjust(latents, way, ᾱ)`` and are moved by the ``wishes``. A U-Net that inpaints sees ``beside`` them a mask and
    the latents around it.
    """

    unet: UNet
    schedule: NoiseSchedule
    text_embeddings: Float[Tensor, "batch length width"]
    negative_embeddings: Float[Tensor, "batch length width"]
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    trace: Trace | None = None
    edits: tuple[Edit, ...] = ()
    wishes: tuple[Wish, ...] = ()
    pushes: tuple[Push, ...] = ()
    adjust: Callable[[Tensor, float, float], Tensor] = lambda latents, way, alpha_cumprod: latents
    beside: Float[Tensor, "batch more h w"] | None = None

    @torch.no_grad()
    def __call__(
        self, noisy_latents: Float[Tensor, "batch channels h w"], timestep: float, alpha_cumprod: float
    ) -> DenoiserOutput:
        """What is seen in ``noisy_latents``, which stand at ``timestep`` and noise level ᾱ."""
        noisy_latents = self.adjust(noisy_latents, self.schedule.progress(timestep), alpha_cumprod)
        for wish in self.wishes:
            if self.schedule.progress(timestep) < wish.end:
                noisy_latents = self._wished(wish, noisy_latents, timestep)
        prediction, maps = self._predict(noisy_latents.to(self.unet.dtype), timestep)
        denoised, noise = self.schedule.split(prediction.to(noisy_latents.dtype), noisy_latents, alpha_cumprod)
        return DenoiserOutput(latents=noisy_latents, denoised=denoised, noise=noise, maps=maps)

    def _predict(self, noisy_latents: Tensor, timestep: float) -> tuple[Tensor, AttentionMaps]:
        timesteps = torch.full((len(noisy_latents),), timestep, dtype=torch.float32, device=noisy_latents.device)
        noisy_latents = self._seen(noisy_latents)
        if self.guidance <= 1:
            positive, maps = self._look(noisy_latents, timesteps, self.text_embeddings, timestep)
            guided = positive
        else:
            both = torch.cat([self.negative_embeddings, self.text_embeddings])
            predictions, maps = self._look(noisy_latents.repeat(2, 1, 1, 1), timesteps.repeat(2), both, timestep)
            negative, positive = predictions.chunk(2)
            guided = negative + self.guidance * (positive - negative)
            guided = rescale_guidance(guided, positive, self.guidance_rescale)
        for push in self.pushes:
            guided = self._pushed(push, guided, positive, noisy_latents, timesteps)
        return guided, maps

    def _pushed(self, push: Push, guided: Tensor, positive: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The guided prediction, with one picture's further from what it would be with another's words."""
        first, second = push.rows
        row = slice(second, second + 1)
        before = self.unet(noisy_latents[row], timesteps[row], self.text_embeddings[first : first + 1])
        result = guided.clone()
        result[row] += push.strength * (positive[row] - before)
        return result

    def _look(
        self, noisy_latents: Tensor, timesteps: Tensor, text_embeddings: Tensor, timestep: float
    ) -> tuple[Tensor, AttentionMaps]:
        """One run of the U-Net; what is looked at in it are its last rows, the text's."""
        edits = self._edits_at(timestep)
        trace = self.trace if self.trace is not None and self.schedule.progress(timestep) >= self.trace.start else None
        if trace is None and not edits:
            return self.unet(noisy_latents, timesteps, text_embeddings), {}
        return self.unet.trace(
            noisy_latents,
            timesteps,
            text_embeddings,
            sites=() if trace is None else trace.sites,
            reduce="none" if trace is not None and trace.per_head else "heads",
            rows=slice(-len(self.text_embeddings), None),
            edits=edits,
        )

    @torch.enable_grad()
    def _wished(self, wish: Wish, noisy_latents: Tensor, timestep: float) -> Tensor:
        """The latents, moved down the wish's gradient."""
        latents = noisy_latents.detach().requires_grad_()
        timesteps = torch.full((len(latents),), timestep, dtype=torch.float32, device=latents.device)
        _, maps = self.unet.trace(
            self._seen(latents.to(self.unet.dtype)),
            timesteps,
            self.text_embeddings,
            sites=wish.sites,
            edits=self._edits_at(timestep),
        )
        wished = torch.zeros(len(latents), device=latents.device)
        wished[slice(None) if wish.rows is None else list(wish.rows)] = 1
        loss = wished * wish.loss(maps)
        (gradient,) = torch.autograd.grad(loss.sum(), latents)
        size = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        return (latents - wish.strength * loss.reshape(-1, 1, 1, 1) * gradient / size).detach()

    def _seen(self, noisy_latents: Tensor) -> Tensor:
        return (
            noisy_latents if self.beside is None else torch.cat([noisy_latents, self.beside.to(noisy_latents)], dim=1)
        )

    def _edits_at(self, timestep: float) -> list[Edit]:
        return [edit for edit in self.edits if edit.holds(self.schedule.progress(timestep))]


def rescale_guidance(
    guided: Float[Tensor, "batch channels h w"], positive: Float[Tensor, "batch channels h w"], rescale: float
) -> Float[Tensor, "batch channels h w"]:
    """Give a guided prediction back some of the spread of the unguided one (arXiv 2305.08891, section 3.4)."""
    if not rescale:
        return guided
    spread = positive.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return guided * (rescale * spread + 1 - rescale)
