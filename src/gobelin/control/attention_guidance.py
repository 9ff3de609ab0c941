"""What attention maps should be like: latents are moved towards it, and attention itself is left as it is.

These compose with :mod:`gobelin.control.attention_control` by standing in one list with them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gobelin.attention import AttentionMaps, AttentionSite, Sites
from gobelin.control.attention_control import Region, grid_of, is_coarse
from gobelin.errors import UsageError
from gobelin.tokenizer import Word, Words


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Something that attention maps should be like: latents are moved to lessen ``loss(maps)`` [B] before each step.

    They move by ``strength`` · loss in the direction of steepest descent, root mean square over a picture's latents,
    until the share ``end`` of the way. Of a batch only the pictures ``rows`` wish for it, None being all. The maps are
    those that edits of attention leave.
    """

    loss: Callable[[AttentionMaps], Tensor]
    sites: Sites = None
    strength: float = 0.3
    end: float = 0.5
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise UsageError(f"the strength is {self.strength}: give 0 (latents stay where they are) or more")


def excited(
    words: Words,
    *wanted: Word,
    latent_size: tuple[int, int],
    strength: float = 0.3,
    end: float = 0.5,
    rows: Sequence[int] | None = None,
) -> Wish:
    """After attend-and-excite (Chefer et al. 2023, arXiv 2301.13826): no word may be left out.

    The loss is one minus the greatest attention that the most neglected of the wanted words has at any patch. As in
    the paper it is shared out among the text's tokens by a softmax of 100 times itself, over the finest sites with at
    most 16×16 patches, and smoothed by a 3×3 Gaussian of σ = 0.5. Unlike there, how far latents move does not depend on
    the gradient's own size, and there are no extra rounds until a threshold is reached.
    """
    tokens = [list(words.tokens(word)) for word in wanted]
    if not tokens:
        raise UsageError("no word given: say which must not be left out")
    kernel = torch.tensor([0.1065, 0.7870, 0.1065])

    def loss(maps: AttentionMaps) -> Tensor:
        finest = _finest(maps)
        probs = torch.stack(list(finest.values())).mean(dim=0)[..., 1 : words.end]
        probs = torch.softmax(100 * probs, dim=-1)
        grid = grid_of(next(iter(finest)), latent_size, probs)
        peaks = []
        for places in tokens:
            share = probs[..., [place - 1 for place in places]].sum(dim=-1).reshape(-1, 1, *grid)
            padded = F.pad(share, (1, 1, 1, 1), mode="replicate")
            smooth = F.conv2d(padded, (kernel[:, None] * kernel)[None, None].to(padded))
            peaks.append(smooth.amax(dim=(1, 2, 3)))
        return 1 - torch.stack(peaks).amin(dim=0)

    return Wish(loss=loss, sites=_coarse_words(latent_size), strength=strength, end=end, rows=rows)


def placed(
    words: Words,
    regions: Sequence[Region],
    latent_size: tuple[int, int],
    strength: float = 3.0,
    end: float = 0.5,
    rows: Sequence[int] | None = None,
) -> Wish:
    """Words are to be looked at from inside their regions (Chen et al. 2023, arXiv 2304.03373, backward guidance).

    The loss is the share of a word's attention that is outside, a mean over words and over the finest sites with at
    most 16×16 patches. Where :func:`regional` forbids, this moves what is there: the two go together.
    """
    wanted = [(list(words.tokens(region.word)), region.mask.cpu().float()) for region in regions]

    def loss(maps: AttentionMaps) -> Tensor:
        outside = []
        for site, probs in _finest(maps).items():
            for tokens, mask in wanted:
                inside = F.interpolate(mask[None, None], size=grid_of(site, latent_size, probs), mode="area").flatten()
                outside.append(1 - (_spread(probs, tokens) * inside.to(probs)).sum(dim=-1))
        return torch.stack(outside).mean(dim=0)

    return Wish(loss=loss, sites=_coarse_words(latent_size), strength=strength, end=end, rows=rows)


def _finest(maps: AttentionMaps) -> AttentionMaps:
    """The maps of the sites with the smallest patches."""
    finest = min(site.downscale for site in maps)
    return {site: probs for site, probs in maps.items() if site.downscale == finest}


def _spread(probs: Tensor, tokens: Sequence[int]) -> Tensor:
    """How some tokens' attention [..., patches] is spread over the patches: shares that sum to 1."""
    share = probs[..., list(tokens)].sum(dim=-1)
    return share / share.sum(dim=-1, keepdim=True).clamp(min=1e-9)


def _coarse_words(latent_size: tuple[int, int]) -> Callable[[AttentionSite], bool]:
    return lambda site: site.kind == "cross" and is_coarse(site, latent_size)
