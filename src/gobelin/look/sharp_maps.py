"""Sharp maps: which sites and steps point best, and how self-attention sharpens a word's map."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.attention import AttentionSite, Trace
from gobelin.head_weights import HeadWeights

MOST_PATCHES = 48 * 32  # of a site whose self-attention is kept: 9 MB; at 512 pixels the finest have 64×64, 67 MB
_LATE = 0.5  # progress from which maps point best: IoU .62, and .53 over all steps (*Which attention points*)


def sharp_trace(
    sites: Sequence[AttentionSite], latent_size: tuple[int, int], head_weights: HeadWeights | None = None
) -> Trace:
    """Choose the trace that sharp maps need, :meth:`gobelin.look.heatmaps.HeatMaps.sharpened`: attn1 and attn2 of the
    decoder's finest level, late.

    The finest level of at most 48×32 patches, or else the coarsest; which attention points best was measured on
    scenes (docs/decisions.md, *Which attention points*). Where ``head_weights`` are of that level, they are used, with
    the heads of their sites apart.
    """

    def patches(site: AttentionSite) -> int:
        return math.prod(site.grid(*latent_size))

    decoder = [site for site in sites if site.name.startswith("up_blocks")] or sites
    few = [site for site in decoder if patches(site) <= MOST_PATCHES]
    chosen = max(map(patches, few)) if few else min(map(patches, decoder))
    level = [site for site in sites if patches(site) == chosen]
    if head_weights is not None and head_weights.fits({site.name: site.heads for site in level}):
        weighted = [site for site in level if site.name in head_weights.cross or site.name in head_weights.own]
        return Trace(sites=weighted, start=_LATE, per_head=True, head_weights=head_weights)
    return Trace(sites=[site for site in level if site in decoder], start=_LATE)


def sharpen(
    share: Float[Tensor, "*words patches"], own: Float[Tensor, "patches patches"]
) -> Float[Tensor, "*words patches"]:
    """Sharpen maps of patches: each keeps it as far as the patches that it attends to, by ``own``, have it too."""
    gathered = torch.einsum("qk,...k->...q", own, share)
    return share * gathered / gathered.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(gathered.dtype).tiny)
