"""Attention guidance: latents are moved down the gradient of a loss of attention maps, which stay as they are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gobelin.attention import AttentionMaps, Sites, choose_sites
from gobelin.control.attention_control import Regions, listed_regions
from gobelin.control.batch import Attached, Batch, Rows, WordControl, WordList
from gobelin.denoiser import ComposableDenoiser
from gobelin.errors import UsageError
from gobelin.guidance import ConditionedUNet
from gobelin.samplers import DenoiserOutput
from gobelin.types import Latents
from gobelin.validation import Fraction, shown, validated
from gobelin.words import Word

_SHARPNESS = 100.0  # of the softmax over text tokens: attend-and-excite's own scale of its maps
_GAUSSIAN = (0.1065, 0.7870, 0.1065)  # σ = 0.5 over 3 patches, attend-and-excite's smoothing


@dataclass(frozen=True, kw_only=True)
class AttentionGuidance:
    """Attention guidance: before each step, move latents down the gradient of ``loss(maps)``, one value an image.

    They move by ``strength`` · loss in the direction of steepest descent, as the root mean square over an image's
    latents, until the share ``end`` of the way. ``rows`` are the images that are moved, None all. The maps [B, patches,
    tokens] of ``sites`` are those that attention edits leave. It costs a pass with gradients a step.
    """

    loss: Callable[[AttentionMaps], Tensor]
    sites: Sites = None
    strength: float = 0.3
    end: float = 0.5
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not validated("strength", self.strength, float) >= 0:
            raise UsageError(f"the strength is {self.strength}: give 0 (latents stay where they are) or more")
        validated("end", self.end, Fraction)
        validated("rows", self.rows, Rows)
        if not callable(self.loss):
            raise UsageError(f"the loss is {shown(self.loss)}: give a function of attention maps, one value an image")

    def attach(self, batch: Batch) -> Attached:
        """Wrap the denoiser; raises :class:`UsageError` where gradients are turned off for good."""
        if torch.is_inference_mode_enabled():
            raise UsageError("attention guidance needs gradients: paint outside of torch.inference_mode")
        choose_sites(batch.sites, self.sites)
        rows = batch.rows(self.rows)
        return Attached(around=lambda denoise, network: _GuidedByAttention(denoise, network, self, tuple(rows)))


@dataclass(frozen=True)
class _GuidedByAttention:
    """A denoiser whose latents are moved first."""

    denoise: ComposableDenoiser
    network: ConditionedUNet
    guidance: AttentionGuidance
    rows: tuple[int, ...]

    def __call__(self, latents: Latents, timestep: float, alpha_cumprod: float) -> DenoiserOutput:
        if self.network.schedule.progress(timestep) < self.guidance.end:
            latents = self._moved(latents, timestep)
        return self.denoise(latents, timestep, alpha_cumprod)

    def finish(self, latents: Latents) -> Latents:
        return self.denoise.finish(latents)

    @torch.enable_grad()
    def _moved(self, latents: Latents, timestep: float) -> Latents:
        latents = latents.detach().requires_grad_()
        timesteps = torch.full((len(latents),), timestep, dtype=torch.float32, device=latents.device)
        _, maps = self.network.unet.trace(
            self.network.inputs(latents),
            timesteps,
            self.network.positive.embeddings,
            self.network.positive.mask,
            sites=self.guidance.sites,
            edits=self.network.edits_at(timestep, observers=False),
        )
        chosen = torch.zeros(len(latents), device=latents.device)
        chosen[list(self.rows)] = 1
        loss = chosen * self.guidance.loss(maps)
        (gradient,) = torch.autograd.grad(loss.sum(), latents)
        size = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        return (latents - self.guidance.strength * loss.reshape(-1, 1, 1, 1) * gradient / size).detach()


def attend_and_excite(
    *words: Word, strength: float = 0.3, end: float = 0.5, rows: Sequence[int] | None = None
) -> WordControl:
    """Attend-and-excite: no word may be neglected (after Chefer et al. 2023, arXiv 2301.13826).

    The loss is one minus the greatest attention that the most neglected of the words has at any patch. As in the paper
    it is shared out among the text's tokens by a softmax of 100 times itself, over the finest sites with at most 16×16
    patches, and smoothed by a 3×3 Gaussian of σ = 0.5. Unlike there, how far latents move does not depend on the
    gradient's own size, and there are no extra rounds until a threshold is reached.
    """
    validated("words", words, WordList)
    if not words:
        raise UsageError("no word given: say which must not be left out")

    def resolve(batch: Batch) -> Iterator[AttentionGuidance]:
        chosen = batch.rows(rows, *words)
        text = {row: list(batch.words[row].part("text")) for row in chosen}
        tokens = {
            row: [[text[row].index(token) for token in batch.words[row].tokens(word)] for word in words]
            for row in chosen
        }
        kernel = torch.tensor(_GAUSSIAN)

        def loss(maps: AttentionMaps) -> Tensor:
            finest = _finest(maps)
            mean = torch.stack(list(finest.values())).mean(dim=0)
            grid = batch.grid(next(iter(finest)))
            losses = [mean.new_zeros(())] * len(batch)
            for row in chosen:
                probs = torch.softmax(_SHARPNESS * mean[row][:, text[row]], dim=-1)
                share = torch.stack([probs[:, places].sum(dim=-1).reshape(grid) for places in tokens[row]])
                padded = F.pad(share[:, None], (1, 1, 1, 1), mode="replicate")
                smooth = F.conv2d(padded, (kernel[:, None] * kernel)[None, None].to(padded))
                losses[row] = 1 - smooth.amax(dim=(1, 2, 3)).amin()
            return torch.stack(losses)

        yield AttentionGuidance(loss=loss, sites=_coarse(batch), strength=strength, end=end, rows=chosen)

    arguments = {"words": words, "strength": strength, "end": end, "rows": rows}
    return WordControl(name="attend_and_excite", arguments=arguments, resolve=resolve)


def box_guidance(
    regions: Regions, strength: float = 3.0, end: float = 0.5, rows: Sequence[int] | None = None
) -> WordControl:
    """Box guidance: words are attended to from inside their regions (backward guidance, Chen et al. 2023, arXiv
    2304.03373, equation 4).

    The loss is the share of a word's attention that is outside of its regions, a mean over words and over the finest
    sites with at most 16×16 patches. Where :func:`regional_attention` forbids, this moves what is there; beside it
    nothing is left outside to move. Name whole phrases (docs/decisions.md, *On the page a box is for a phrase*).
    """
    regions = listed_regions(regions)
    if not regions:
        raise UsageError("no region given: say which words belong where")

    def resolve(batch: Batch) -> Iterator[AttentionGuidance]:
        chosen = batch.rows(rows, *regions)
        tokens = {row: {word: list(batch.words[row].tokens(word)) for word in regions} for row in chosen}

        def loss(maps: AttentionMaps) -> Tensor:
            finest = _finest(maps)
            losses = [next(iter(finest.values())).new_zeros(())] * len(batch)
            for row in chosen:
                outside: list[Tensor] = []
                for site, probs in finest.items():
                    for word, where in regions.items():
                        inside = torch.stack([region.on(batch.grid(site)) for region in where]).amax(dim=0)
                        share = probs[row][:, tokens[row][word]].sum(dim=-1)
                        share = share / share.sum().clamp(min=1e-9)
                        outside.append(1 - (share * inside.to(share)).sum())
                losses[row] = torch.stack(outside).mean()
            return torch.stack(losses)

        yield AttentionGuidance(loss=loss, sites=_coarse(batch), strength=strength, end=end, rows=chosen)

    arguments = {"regions": regions, "strength": strength, "end": end, "rows": rows}
    return WordControl(name="box_guidance", arguments=arguments, resolve=resolve)


def _finest(maps: AttentionMaps) -> AttentionMaps:
    """Keep the maps of the sites with the smallest patches."""
    finest = min(site.downscale for site in maps)
    return {site: probs for site, probs in maps.items() if site.downscale == finest}


def _coarse(batch: Batch) -> Sites:
    """Choose the coarse cross-attention, or where all is finer, the coarsest that there is."""
    cross = [site for site in batch.sites if site.kind == "cross"]
    coarsest = max((site.downscale for site in cross), default=1)
    return [site for site in cross if batch.is_coarse(site)] or [s for s in cross if s.downscale == coarsest]
