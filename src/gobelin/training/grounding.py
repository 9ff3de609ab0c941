"""Grounding loss: cross-attention is asked to be where the objects are that words speak of.

In the manner of TokenCompose (Wang et al. 2024, arXiv 2312.03626), whose masks are a segmenter's and whose terms are
two: of a word's attention, as much as can be is to be inside of its object; and a patch of an object is to attend to
the words of that object rather than to those of others, which is cross-entropy here over the objects.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gobelin.attention import AttentionMaps, AttentionSite

_TINY = 1e-6  # of shares, below which there is no attention to speak of


def is_grounded(site: AttentionSite) -> bool:
    """Tell whether a site's attention is grounded: cross-attention on the decoder's side, whose maps point."""
    return site.kind == "cross" and site.name.startswith("up_blocks.")


def grounding_loss(
    maps: AttentionMaps,
    masks: Float[Tensor, "batch groups height width"],
    tokens: Bool[Tensor, "batch groups length"],
) -> Float[Tensor, " batch"]:
    """Compute the loss of each sample, a mean over sites and groups: 0 where all attention is in place.

    ``maps`` are means over heads [B, patches, keys]; ``masks`` are shares of the latents' patches that each group of
    objects covers, and ``tokens`` those that speak of it. Samples without groups have none.
    """
    size = (masks.shape[2], masks.shape[3])
    losses = []
    for site, probs in maps.items():
        height, width = site.grid(*size)
        where = F.interpolate(masks, size=(height, width), mode="area").flatten(2)
        there = tokens.any(dim=2) & (where.sum(dim=2) > 0)
        where = where * there[..., None]
        shares = tokens.to(probs.dtype) @ probs[..., : tokens.shape[2]].transpose(1, 2)
        inside = (where * shares).sum(dim=2) / shares.sum(dim=2).clamp(min=_TINY)
        outside = ((1 - inside).square() * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
        told = shares / shares.sum(dim=1, keepdim=True).clamp(min=_TINY)
        confused = -(where * told.clamp(min=_TINY).log()).sum(dim=(1, 2)) / where.sum(dim=(1, 2)).clamp(min=_TINY)
        losses.append(outside + confused)
    return torch.stack(losses).mean(dim=0)
