"""Attention control: words looked at more, less, from elsewhere, or as in another image.

Each function returns a control that changes cross-attention's probabilities and leaves the network as it is.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Len
from jaxtyping import Float
from torch import Tensor

from gobelin.attention import AttentionEdit, AttentionSite
from gobelin.control.alignment import alignment
from gobelin.control.batch import Batch, RowPair, Rows, WordControl, WordList, in_rows
from gobelin.errors import UsageError
from gobelin.validation import Fraction, shown, validated
from gobelin.words import Word

_TINY = 1e-9
_WordWeights = Annotated[Mapping[Word, Any], "words and their weights, as in {'red': 2}"]
_WordRegions = Annotated[Mapping[Word, Any], "words and their regions, as in {'circle': Region.box(0, 0, 0.5, 1)}"]


def reweight(weights: Mapping[Word, float], rows: Sequence[int] | None = None) -> WordControl:
    """Reweight words: patches attend to them ``weight`` times as much, 0 not at all (prompt-to-prompt, section 3.3).

    Rows of probabilities do not sum to 1 any more: what is added is added to what the patch becomes. ``rows`` are
    images of the batch, None all whose prompts have the words. Raises :class:`UsageError`, when painting starts, for
    a word that no prompt has; at once for a weight below 0.
    """
    validated("rows", rows, Rows)
    for word, weight in validated("weights", weights, _WordWeights).items():
        if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
            raise UsageError(f"the weight of {word!r} is {shown(weight)}: give 0 (not at all) or more")

    def resolve(batch: Batch) -> Iterator[AttentionEdit]:
        chosen = batch.rows(rows, *weights)
        scale = torch.ones(len(chosen), 1, 1, batch.words[0].length)
        for place, row in enumerate(chosen):
            for word, weight in weights.items():
                scale[place, ..., list(batch.words[row].tokens(word))] = weight
        yield AttentionEdit(
            change=lambda site, probs: in_rows(probs, chosen, probs[chosen] * scale.to(probs)), sites=_is_cross
        )

    return WordControl(name="reweight", arguments={"weights": dict(weights), "rows": rows}, resolve=resolve)


def suppress(*words: Word, rows: Sequence[int] | None = None) -> WordControl:
    """Suppress words: nothing attends to them, and the attention they had goes to the other tokens in proportion."""
    validated("words", words, WordList)
    validated("rows", rows, Rows)
    if not words:
        raise UsageError("no word given: say which to suppress")

    def resolve(batch: Batch) -> Iterator[AttentionEdit]:
        chosen = batch.rows(rows, *words)
        kept = torch.ones(len(chosen), 1, 1, batch.words[0].length)
        for place, row in enumerate(chosen):
            kept[place, ..., [token for word in words for token in batch.words[row].tokens(word)]] = 0

        def change(site: AttentionSite, probs: Tensor) -> Tensor:
            return in_rows(probs, chosen, _normalised(probs[chosen] * kept.to(probs)))

        yield AttentionEdit(change=change, sites=_is_cross)

    return WordControl(name="suppress", arguments={"words": words, "rows": rows}, resolve=resolve)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A region of an image: a mask [H, W] of any size, 1 inside and 0 outside."""

    mask: Float[Tensor, "height width"]

    def __post_init__(self) -> None:
        validated("the mask of a region", self.mask, Annotated[Tensor, "a tensor [height, width], or Region.box"])
        if self.mask.ndim != 2 or not self.mask.numel():
            raise UsageError(f"the mask of a region is {list(self.mask.shape)}: give [height, width]")
        low, high = (value.item() for value in self.mask.float().aminmax())
        if not (low >= 0 and high <= 1):
            raise UsageError(f"the mask of a region has values from {low:g} to {high:g}: give 0 outside and 1 inside")

    def __repr__(self) -> str:
        height, width = self.mask.shape
        return f"Region({width}×{height}, {self.mask.float().mean().item():.0%} of the image)"

    @classmethod
    def box(cls, left: float, top: float, right: float, bottom: float) -> "Region":
        """Make a box in shares of the image's width and height, 0 to 1; raises :class:`UsageError` for an empty one."""
        for name, side in (("left", left), ("top", top), ("right", right), ("bottom", bottom)):
            validated(name, side, float)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UsageError(
                f"the region {left}, {top} to {right}, {bottom} is not in the image: give left < right and "
                "top < bottom, as shares from 0 to 1"
            )
        side = 960  # 64 · 15: edges at thirds, fifths and powers of two fall between patches
        mask = torch.zeros(side, side)
        mask[round(top * side) : round(bottom * side), round(left * side) : round(right * side)] = 1
        return cls(mask=mask)

    def on(self, grid: tuple[int, int]) -> Float[Tensor, " patches"]:
        """Compute the share of each patch that is inside."""
        return F.interpolate(self.mask.cpu().float()[None, None], size=grid, mode="area").flatten()


_RegionList = Annotated[Sequence[Region], Len(1), "Region.box(0, 0, 0.5, 1), or several"]
Regions = Mapping[Word, Region | Sequence[Region]]
"""Words and where they belong: in one region, or in any of several."""


def regional_attention(
    regions: Regions, strength: float = 3.0, end: float = 0.5, rows: Sequence[int] | None = None
) -> WordControl:
    """Regional attention: words are attended to ``strength`` times as much from inside their regions, and not from
    outside.

    It holds until the share ``end`` of the way, when the layout is settled. Name whole phrases, as in
    ``{"blue ring": region}``: a noun alone moves few things (docs/decisions.md, *On the page a box is for a phrase*).
    """
    regions = listed_regions(regions)
    validated("rows", rows, Rows)
    validated("end", end, Fraction)
    if not validated("strength", strength, float) > 0:
        raise UsageError(f"the strength is {strength}: give more than 0")

    def resolve(batch: Batch) -> Iterator[AttentionEdit]:
        chosen = batch.rows(rows, *regions)
        tokens = [{word: list(batch.words[row].tokens(word)) for word in regions} for row in chosen]

        def change(site: AttentionSite, probs: Tensor) -> Tensor:
            weights = torch.ones(len(chosen), 1, *probs.shape[-2:])
            for word, where in regions.items():
                inside = torch.stack([region.on(batch.grid(site)) for region in where]).amax(dim=0)
                for place, found in enumerate(tokens):
                    weights[place, 0, :, found[word]] = strength * inside[:, None]
            return in_rows(probs, chosen, _normalised(probs[chosen] * weights.to(probs)))

        yield AttentionEdit(change=change, sites=_is_cross, end=end)

    arguments = {"regions": regions, "strength": strength, "end": end, "rows": rows}
    return WordControl(name="regional_attention", arguments=arguments, resolve=resolve)


def listed_regions(regions: Regions) -> dict[Word, list[Region]]:
    """List the regions of each word; raises :class:`UsageError` for what is none."""
    listed: dict[Word, list[Region]] = {}
    for word, where in validated("regions", regions, _WordRegions).items():
        several = [where] if isinstance(where, Region) else where
        listed[word] = validated(f"the region of {word!r}", several, _RegionList)
    return listed


def prompt_to_prompt(
    cross_replace: float = 0.8, self_replace: float = 0.4, rows: tuple[int, int] = (0, 1)
) -> WordControl:
    """Prompt-to-prompt: paint a changed prompt, keep the image (Hertz et al. 2022, arXiv 2208.01626, section 3.2).

    The image ``rows[1]`` attends to its words as ``rows[0]`` attends to the words in their place, until the share
    ``cross_replace`` of the way; new words are attended to for themselves. Until the share ``self_replace`` its patches
    attend to each other as the other image's do, at coarse sites. Both images are painted in one batch.
    """
    validated("rows", rows, RowPair)
    for name, share in (("cross_replace", cross_replace), ("self_replace", self_replace)):
        validated(name, share, Fraction)

    def resolve(batch: Batch) -> Iterator[AttentionEdit]:
        first, second = batch.rows(rows)
        mapping = alignment(batch.words[first], batch.words[second])
        is_new = mapping.sum(dim=0) == 0

        def replace_cross(site: AttentionSite, probs: Tensor) -> Tensor:
            taken = probs[first] @ mapping.to(probs)
            return in_rows(probs, [second], torch.where(is_new.to(probs.device), probs[second], taken)[None])

        def replace_self(site: AttentionSite, probs: Tensor) -> Tensor:
            return in_rows(probs, [second], probs[first : first + 1])

        yield AttentionEdit(change=replace_cross, sites=_is_cross, end=cross_replace)
        if any(_is_coarse_self(batch, site) for site in batch.sites):
            yield AttentionEdit(change=replace_self, sites=lambda site: _is_coarse_self(batch, site), end=self_replace)

    arguments = {"cross_replace": cross_replace, "self_replace": self_replace, "rows": rows}
    return WordControl(name="prompt_to_prompt", arguments=arguments, resolve=resolve)


def _is_cross(site: AttentionSite) -> bool:
    return site.kind == "cross"


def _is_coarse_self(batch: Batch, site: AttentionSite) -> bool:
    return site.kind == "self" and batch.is_coarse(site)


def _normalised(probs: Tensor) -> Tensor:
    return probs / probs.sum(dim=-1, keepdim=True).clamp(min=_TINY)
