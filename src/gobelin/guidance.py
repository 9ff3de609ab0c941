"""Guidance: what becomes of a U-Net's predictions with the prompt and without it.

A guidance is a function ``(predictions) -> prediction``. It asks for the :class:`Predictions` that it needs, and each
costs a pass of the U-Net: :func:`classifier_free_guidance` asks for two, in one pass of twice as many texts. Whoever
writes another one passes it as ``guidance=`` to the pipeline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.attention import AnyAttentionEdit, AttentionEdit, AttentionMaps, AttentionSite, ExtraWords, Trace
from gobelin.engines import NoisePredictor
from gobelin.errors import UsageError
from gobelin.schedule import NoiseSchedule
from gobelin.shortcuts import ShortcutPlan
from gobelin.text_conditioning import TextConditioning
from gobelin.types import Latents
from gobelin.validation import shown, validated


@dataclass(frozen=True, kw_only=True)
class ConditionedUNet:
    """A U-Net with the texts of a batch: noisy latents in, predictions for either text out.

    ``positive`` and ``negative`` are of one length. ``edits`` and ``trace`` concern attention with the positive text,
    and ``also`` are the words that the trace looks for beside it.
    ``extra_channels`` are what an inpainting U-Net sees beside the latents: mask, and latents of the masked image.
    ``shortcuts`` are what the painting's own passes may leave out, None where they are exact.
    """

    unet: NoisePredictor
    schedule: NoiseSchedule
    positive: TextConditioning
    negative: TextConditioning
    edits: tuple[AnyAttentionEdit, ...] = ()
    trace: Trace | None = None
    also: ExtraWords | None = None
    extra_channels: Latents | None = None
    shortcuts: ShortcutPlan | None = None

    def inputs(self, noisy_latents: Latents, rows: slice = slice(None)) -> Float[Tensor, "batch inputs h w"]:
        """Add the extra channels to latents of some rows, in the U-Net's precision."""
        if self.extra_channels is not None:
            extra = self.extra_channels[rows].to(noisy_latents)
            noisy_latents = torch.cat([noisy_latents, extra], dim=1)
        return noisy_latents.to(self.unet.dtype)

    def edits_at(self, timestep: float, observers: bool = True) -> list[AnyAttentionEdit]:
        """List the attention edits that hold at a timestep, with those that only observe or without them."""
        progress = self.schedule.progress(timestep)
        return [edit for edit in self.edits if edit.holds(progress) and (observers or not edit.observes)]

    def trace_at(self, timestep: float) -> Trace | None:
        """Return the trace where it has begun at a timestep."""
        begun = self.trace is not None and self.schedule.progress(timestep) >= self.trace.start
        return self.trace if begun else None


@dataclass(kw_only=True)
class Predictions:
    """The U-Net's predictions at one step: each is computed when it is first asked for, and kept.

    ``noisy_latents`` [B, C, h, w] stand at ``timestep`` and noise level ``alpha_cumprod``; predictions are like them,
    of noise or of velocity as the schedule says. ``memory`` lasts for a whole painting, for guidance with momentum.
    ``maps`` are the attention maps of the positive half, where they are traced; before them those of the negative one,
    where the trace wants them and it was run.
    """

    network: ConditionedUNet
    noisy_latents: Latents
    timestep: float
    alpha_cumprod: float
    memory: dict[str, Any] = field(default_factory=dict)
    maps: AttentionMaps = field(default_factory=dict)
    _positive: Tensor | None = None
    _negative: Tensor | None = None

    @property
    def progress(self) -> float:
        """The share of the way from noise to image, 0 to 1, in timesteps."""
        return self.network.schedule.progress(self.timestep)

    def positive(self) -> Latents:
        """Predict with the prompt."""
        if self._positive is None:
            self._positive = self._traced(self.network.positive, 1)
        return self._positive

    def both(self) -> tuple[Latents, Latents]:
        """Predict with the negative prompt and with the prompt, in one pass."""
        if self._positive is None or self._negative is None:
            self._negative, self._positive = self._traced(self.network.negative + self.network.positive, 2).chunk(2)
        return self._negative, self._positive

    def predict(
        self, text: TextConditioning, rows: slice = slice(None), edits: Sequence[AnyAttentionEdit] = ()
    ) -> Latents:
        """Predict some rows with any text, and with attention edits of its own."""
        latents = self.network.inputs(self.noisy_latents[rows], rows)
        if not edits:
            return self.network.unet(latents, self._timesteps(len(latents)), text.embeddings, text.mask)
        run = partial(self.network.unet.trace, sites=(), edits=edits)
        return run(latents, self._timesteps(len(latents)), text.embeddings, text.mask)[0]

    def denoised(self, prediction: Latents) -> Latents:
        """Compute the clean latents ẑ₀ that a prediction stands for."""
        latents = self.noisy_latents.to(prediction.dtype)
        return self.network.schedule.split(prediction, latents, self.alpha_cumprod)[0]

    def _traced(self, text: TextConditioning, halves: int) -> Tensor:
        latents = self.network.inputs(self.noisy_latents)
        timesteps = self._timesteps(len(latents))
        edits, trace = self.network.edits_at(self.timestep), self.network.trace_at(self.timestep)
        plan = self.network.shortcuts
        shortcuts = None if plan is None else plan.next(halves, self.timestep, is_controlled=bool(edits))
        if trace is None and not edits and shortcuts is None:
            return self.network.unet(latents, timesteps, text.embeddings, text.mask)
        unedited = len(self.noisy_latents) * (halves - 1) if trace is not None and trace.negative else 0
        prediction, self.maps = self.network.unet.trace(
            latents,
            timesteps,
            text.embeddings,
            text.mask,
            sites=() if trace is None else trace.sites,
            reduce="none" if trace is not None and trace.per_head else "heads",
            rows=slice(-len(self.noisy_latents) - unedited, None),
            edits=edits,
            shortcuts=shortcuts,
            unedited=unedited,
            also=self.network.also,
        )
        return prediction

    def _timesteps(self, count: int) -> Tensor:
        return torch.full((count,), self.timestep, dtype=torch.float32, device=self.noisy_latents.device)


Guidance = Callable[[Predictions], Latents]
"""``guidance(predictions) -> prediction``: what the sampler goes by."""


def classifier_free_guidance(scale: float, rescale: float = 0.0) -> Guidance:
    """Classifier-free guidance: ε(negative) + scale · (ε(prompt) − ε(negative)) (Ho and Salimans 2022, equation 6).

    A ``scale`` of 1 or less turns it off, and the negative half is not run. ``rescale`` is φ of arXiv 2305.08891,
    section 3.4, 0 (off) to 1: it gives the guided prediction back some of the spread of the unguided one.
    """
    _check_numbers(scale=scale, rescale=rescale)

    def guide(predictions: Predictions) -> Latents:
        if scale <= 1:
            return predictions.positive()
        negative, positive = predictions.both()
        return rescale_guidance(negative + scale * (positive - negative), positive, rescale)

    return guide


def rescale_guidance(guided: Latents, positive: Latents, rescale: float) -> Latents:
    """Rescale a guided prediction towards the spread of the unguided one (arXiv 2305.08891, section 3.4)."""
    if not rescale:
        return guided
    spread = positive.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return guided * (rescale * spread + 1 - rescale)


def guidance_interval(guidance: Guidance, start: float, end: float) -> Guidance:
    """Guidance interval: guide from the share ``start`` of the way until ``end`` only (Kynkäänniemi et al. 2024,
    arXiv 2404.07724); elsewhere the prompt's own prediction is taken, at half the cost."""
    _check_wrapped(guidance)
    if not all(isinstance(one, int | float) for one in (start, end)) or not 0 <= start <= end <= 1:
        raise UsageError(f"the guidance interval is {start} to {end}: give shares of the way, 0 ≤ start ≤ end ≤ 1")
    return lambda predictions: (
        guidance(predictions)
        if start <= predictions.progress < end or end == 1 <= predictions.progress
        else predictions.positive()
    )


def adaptive_projected_guidance(
    scale: float, parallel: float = 0.0, norm: float = 15.0, momentum: float = -0.5
) -> Guidance:
    """Adaptive projected guidance, APG: guide without oversaturation (Sadat et al. 2024, arXiv 2410.02416).

    Algorithm 1: in clean latents, the difference of the two predictions is averaged with ``momentum``, shortened to
    ``norm``, and its part parallel to the prompt's prediction is kept by the share ``parallel`` (η) only. Defaults are
    the paper's for Stable Diffusion.
    """
    _check_numbers(scale=scale, parallel=parallel, momentum=momentum)
    if not (isinstance(norm, int | float) and norm > 0):
        raise UsageError(f"norm is {shown(norm)}: give a number above 0, or math.inf for no limit")

    def guide(predictions: Predictions) -> Latents:
        negative, positive = predictions.both()
        clean = predictions.denoised(positive)
        difference = clean - predictions.denoised(negative)
        difference = difference + momentum * predictions.memory.get("apg", torch.zeros_like(difference))
        predictions.memory["apg"] = difference
        axes = (1, 2, 3)
        length = torch.linalg.vector_norm(difference, dim=axes, keepdim=True)
        difference = difference * (norm / length.clamp(min=1e-12)).clamp(max=1)
        unit = clean / torch.linalg.vector_norm(clean, dim=axes, keepdim=True).clamp(min=1e-12)
        along = (difference * unit).sum(dim=axes, keepdim=True) * unit
        moved = (scale - 1) * (difference - along + parallel * along)
        slope = predictions.network.schedule.denoised_slope(predictions.alpha_cumprod)
        return positive + (moved / slope).to(positive.dtype)

    return guide


def cfg_zero_star(scale: float) -> Guidance:
    """CFG-Zero*: classifier-free guidance with the negative prediction scaled to fit the positive one (Fan et al. 2025,
    arXiv 2503.18886, equation 11): s = ⟨positive, negative⟩ / ‖negative‖². Its zero-init is for flow matching only."""
    _check_numbers(scale=scale)

    def guide(predictions: Predictions) -> Latents:
        negative, positive = predictions.both()
        inner = (positive * negative).sum(dim=(1, 2, 3), keepdim=True)
        fitted = inner / negative.square().sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12) * negative
        return fitted + scale * (positive - fitted)

    return guide


def perturbed_attention_guidance(guidance: Guidance, scale: float = 3.0, sites: str = "mid_block*attn1") -> Guidance:
    """Perturbed-attention guidance, PAG: away from what is predicted where patches see only themselves.

    Ahn et al. 2024 (arXiv 2403.17377), equation 14.

    ``sites`` is a pattern of self-attention sites (:func:`gobelin.attention.choose_sites`). Adds a pass a step.
    """
    _check_wrapped(guidance)
    _check_numbers(scale=scale)

    def see_only_themselves(site: AttentionSite, probs: Tensor) -> Tensor:
        if site.kind != "self":
            raise UsageError(f"perturbed-attention guidance is for self-attention, and {site.name} sees words")
        return torch.eye(probs.shape[-1], device=probs.device, dtype=probs.dtype).expand_as(probs)

    def guide(predictions: Predictions) -> Latents:
        guided = guidance(predictions)
        edits = [
            *predictions.network.edits_at(predictions.timestep, observers=False),
            AttentionEdit(change=see_only_themselves, sites=sites),
        ]
        perturbed = predictions.predict(predictions.network.positive, edits=edits)
        return guided + scale * (predictions.positive() - perturbed)

    return guide


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        validated(name, number, float)


def _check_wrapped(guidance: Guidance) -> None:
    if not callable(guidance):
        raise UsageError(f"guidance is {shown(guidance)}: give a function, such as classifier_free_guidance(7.5)")
