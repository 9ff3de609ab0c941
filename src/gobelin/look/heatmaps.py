"""From what attentions looked at to which word painted which pixel, and back.

The maps of many sites, steps and heads become one picture's heat maps. Tang et al. 2022 (DAAM, arXiv 2210.04885)
sum them over steps and average them over layers and heads; so does Gobelin.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gobelin.attention import AttentionMaps, AttentionSite, Sites, Trace, choose_sites
from gobelin.errors import UsageError
from gobelin.look.colour_map import overlaid
from gobelin.tokenizer import PARTS, Word, Words, WordSpan

EVEN = 1e-5  # shares that differ by less are rounding
MOST_PATCHES = 48 * 32  # of a site whose self-attention is kept: 9 MB; at 512 pixels the finest have 64×64, 67 MB


def sharp_trace(there: Sequence[AttentionSite], latent_size: tuple[int, int]) -> Trace:
    """What :meth:`HeatMaps.sharpened` is best made of: attn1 and attn2 of the decoder's finest level, late on the way.

    The finest that has no more than 48×32 patches, or else the coarsest. What points best was found on scenes
    (docs/decisions.md).
    """

    def patches(site: AttentionSite) -> int:
        return math.prod(site.grid(*latent_size))

    decoder = [site for site in there if site.name.startswith("up_blocks")] or there
    few = [site for site in decoder if patches(site) <= MOST_PATCHES]
    chosen = max(map(patches, few)) if few else min(map(patches, decoder))
    return Trace(sites=[site for site in decoder if patches(site) == chosen], start=0.5)


class Collector:
    """Adds up the maps of a painting's steps, so that memory does not grow with their number.

    With ``trace.per_step`` each step's are kept instead.
    """

    def __init__(self, trace: Trace):
        self.trace = trace
        self._kept: dict[AttentionSite, list[Tensor]] = {}
        self._steps = 0

    def add(self, maps: AttentionMaps) -> None:
        """One step's maps, [B, patches, keys] or [B, heads, patches, keys]; none where it was not traced."""
        self._steps += bool(maps)
        for site, probs in maps.items():
            kept = self._kept.setdefault(site, [])
            if self.trace.per_step or not kept:
                kept.append(probs.clone())
            else:
                kept[0] += probs

    def maps(self, index: int) -> AttentionMaps:
        """Picture ``index``'s, [steps or 1, heads or 1, patches, keys]: means where steps were added up."""
        scale = 1 if self.trace.per_step else self._steps
        maps = {site: torch.stack([probs[index] for probs in kept]) / scale for site, kept in self._kept.items()}
        return {site: (probs if self.trace.per_head else probs[:, None]).cpu() for site, probs in maps.items()}


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """How much each pixel of a picture has to do with something: with a word, or with one of its own patches.

    ``raw`` [H, W] is the mean share of attention, in [0, 1], that the pixel's patch gives to it; less, where sharpened.
    """

    label: str
    raw: Float[Tensor, "height width"]
    picture: Image.Image

    @property
    def values(self) -> Float[Tensor, "height width"]:
        """For display: ``raw`` from its least to its greatest value as 0 to 1; all 0 where it is even."""
        low, high = self.raw.min(), self.raw.max()
        return (self.raw - low) / (high - low) if high - low > EVEN else torch.zeros_like(self.raw)

    def mask(self, threshold: float = 0.4) -> Tensor:
        """Where ``values`` exceed the threshold, bool [H, W]; DAAM's τ."""
        return self.values > threshold

    def overlay(self, size: int | None = None) -> Image.Image:
        """The picture in grey, and over it the map in colour; ``size`` is the longer side in pixels, else its own."""
        return overlaid(self.picture, self.values, size)

    def _repr_png_(self) -> bytes | None:
        return self.overlay(max(256, *self.picture.size))._repr_png_()


@dataclass(frozen=True, kw_only=True)
class HeatMaps:
    """What the words of one picture painted: ``heatmaps["circle"]`` is a :class:`HeatMap`.

    ``words`` are the prompt's. ``maps`` are by site, [steps, heads, patches, keys], float32, with 1 where steps or
    heads were averaged. ``latent_size`` is (h, w). Where ``sharp``, words' maps are :meth:`sharpened`.
    """

    words: Words
    maps: AttentionMaps
    latent_size: tuple[int, int]
    picture: Image.Image
    sharp: bool = False

    def __repr__(self) -> str:
        return f"HeatMaps(words={self.words.text!r}, sites={len(self.maps)}, size={self.picture.size})"

    def _repr_html_(self) -> str:
        from gobelin.look.page import word_map_element  # which is made of heat maps

        return word_map_element(self)

    def __getitem__(self, key: Word) -> HeatMap:
        """A word or a phrase, wherever it stands; a pair for one of its occurrences, 0 the first; a word by its number.

        Case does not matter. Raises :class:`UsageError` with the words there are.
        """
        tokens = self.words.tokens(key)
        label = self.words.spans[key].word if isinstance(key, int) else key if isinstance(key, str) else key[0]
        return self._map(label, tokens)

    def token(self, position: int) -> HeatMap:
        """One token by its position, BOS being 0."""
        if not 0 <= position < self.words.length:
            raise UsageError(f"there is no token {position}: positions are 0 to {self.words.length - 1}")
        return self._map(f"token {position}", (position,))

    def part(self, part: str) -> HeatMap:
        """What no word stands for: "bos", "eos", "padding"."""
        return self._map(part.upper() if part != "padding" else part, self.words.part(part))

    def select(
        self, *, sites: Sites = None, heads: Sequence[int] | None = None, steps: Sequence[int] | None = None
    ) -> "HeatMaps":
        """The same of a choice of sites (as :func:`gobelin.attention.choose_sites`; None: all), of heads, of steps.

        Heads and steps can be chosen where they were kept apart: ``trace=Trace(per_head=True, per_step=True)``.
        """
        kept = self.maps if sites is None else dict.fromkeys(choose_sites(tuple(self.maps), sites))
        maps = {site: self.maps[site] for site in kept}
        for axis, name, chosen in ((0, "step", steps), (1, "head", heads)):
            if chosen is not None:
                maps = {site: _chosen(probs, axis, name, chosen) for site, probs in maps.items()}
        return replace(self, maps=maps)

    def without(self, *parts: str) -> "HeatMaps":
        """The same with the shares of BOS, EOS or padding left out, and those of the others made to sum to 1 again."""
        gone = [position for part in parts for position in self.words.part(part)]
        maps = dict(self.maps)
        for site, probs in self.maps.items():
            if site.kind == "cross":
                left = probs.clone()
                left[..., gone] = 0
                maps[site] = left / left.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
        return replace(self, maps=maps)

    def sharpened(self) -> "HeatMaps":
        """The same with words' maps sharp: patches keep their share of a word as far as what they draw on has it too.

        At each site the share is multiplied by what self-attention (attn1, a mean over the sites with the same patches)
        gathers of it, over its maximum. ``maps``, :meth:`shares`, :meth:`entropy` and :meth:`daam` stay as they are.
        Raises :class:`UsageError` where self-attention was not traced.
        """
        there = {site.grid(*self.latent_size) for site, _ in self._stack("self")}
        for site, _ in self._stack("cross"):
            if site.grid(*self.latent_size) not in there:
                raise UsageError(f"no attention to patches was traced where {site.name} is: trace its attn1 too")
        return replace(self, sharp=True)

    def words_at(self, x: int, y: int) -> list[tuple[WordSpan, float]]:
        """The words behind the pixel at column ``x``, row ``y``: the share of each among them, greatest first."""
        return self.words_in((x, y, x + 1, y + 1))

    def words_in(self, box: tuple[int, int, int, int]) -> list[tuple[WordSpan, float]]:
        """The words behind a box (left, top, right, bottom) in pixels, the last two not in it; shares as above."""
        left, top, right, bottom = box
        width, height = self.picture.size
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise UsageError(
                f"the region {left}, {top} to {right}, {bottom} is not in the picture of {width}×{height} pixels"
            )
        shares = [
            self._map(span.word, span.tokens).raw[top:bottom, left:right].mean().item() for span in self.words.spans
        ]
        total = sum(shares) or 1.0
        ranked = zip(self.words.spans, (share / total for share in shares), strict=True)
        return sorted(ranked, key=lambda pair: -pair[1])

    def patches_for(self, x: int, y: int) -> HeatMap:
        """What the patch at pixel (x, y) draws on: its self-attention (attn1), where that was traced."""
        width, height = self.picture.size
        if not (0 <= x < width and 0 <= y < height):
            raise UsageError(f"the pixel {x}, {y} is not in the picture of {width}×{height} pixels")

        def seen(site: AttentionSite, probs: Tensor) -> Tensor:
            rows, columns = site.grid(*self.latent_size)
            query = (y * rows // height) * columns + x * columns // width
            return probs[query].reshape(rows, columns)

        raw = self._combined("self", seen, (height, width))
        return HeatMap(label=f"patch at {x}, {y}", raw=raw, picture=self.picture)

    def shares(self) -> dict[str, float]:
        """Where attention goes: the mean share of the text, of BOS, of EOS and of padding.

        They sum to 1, unless an edit changed that.
        """
        mean = torch.stack([probs.mean(dim=(0, 1, 2)) for _, probs in self._stack("cross")]).mean(dim=0)
        places = {"text": tuple(range(1, self.words.end)), **{part: self.words.part(part) for part in PARTS}}
        return {part: mean[list(tokens)].sum().item() for part, tokens in places.items()}

    def entropy(self) -> float:
        """The mean entropy of a patch's attention over tokens, in nats."""
        return torch.stack([torch.special.entr(p).sum(dim=-1).mean() for _, p in self._stack("cross")]).mean().item()

    def daam(self, key: Word) -> HeatMap:
        """The map exactly as DAAM aggregates it, where heads were kept apart: ``trace=Trace(per_head=True)``.

        Every head of every layer is enlarged to the latents' size by bicubic interpolation and clamped at 0; the mean
        is taken over heads and layers, then over the word's tokens; bicubic interpolation once more gives the
        picture's size (``GlobalHeatMap.compute_word_heat_map`` and ``expand_as`` of the daam package). The middle block
        and patches of 8×8 latents are left out, as there.
        """
        tokens = list(self.words.tokens(key))
        layers = []
        for site, probs in self._stack("cross"):
            if site.name.startswith("mid_block") or site.downscale == 8:
                continue
            rows, columns = site.grid(*self.latent_size)
            heads = probs.sum(dim=0)[..., tokens].permute(0, 2, 1).reshape(-1, 1, rows, columns)
            large = F.interpolate(heads, size=self.latent_size, mode="bicubic").clamp(min=0)
            layers.append(large.reshape(-1, len(tokens), *self.latent_size))
        mean = torch.cat(layers).mean(dim=0).mean(dim=0)
        raw = F.interpolate(mean[None, None], size=self.picture.size[::-1], mode="bicubic")[0, 0]
        return HeatMap(label=str(key), raw=raw, picture=self.picture)

    def stacked(self, keys: Sequence[Word]) -> Float[Tensor, "words height width"]:
        """The ``raw`` maps of several words."""
        return torch.stack([self[key].raw for key in keys])

    @property
    def steps(self) -> int:
        """How many steps were kept apart, or are left of them; 1 where they were averaged."""
        return next(iter(self.maps.values())).shape[0]

    def raw(self, tokens: Sequence[int], size: tuple[int, int]) -> Float[Tensor, "height width"]:
        """The mean share of these tokens together, sharpened where ``sharp``, at any size (height, width)."""

        def shared(site: AttentionSite, probs: Tensor) -> Tensor:
            share = probs[:, list(tokens)].sum(dim=-1)
            grid = site.grid(*self.latent_size)
            if self.sharp:
                own = [seen.mean(dim=(0, 1)) for at, seen in self._stack("self") if at.grid(*self.latent_size) == grid]
                gathered = torch.stack(own).mean(dim=0) @ share
                share = share * gathered / gathered.max().clamp(min=torch.finfo(gathered.dtype).tiny)
            return share.reshape(grid)

        return self._combined("cross", shared, size)

    def _map(self, label: str, tokens: Sequence[int]) -> HeatMap:
        return HeatMap(
            label=label, raw=self.raw(tokens, (self.picture.height, self.picture.width)), picture=self.picture
        )

    def _combined(
        self,
        kind: Literal["self", "cross"],
        reduced: Callable[[AttentionSite, Tensor], Tensor],
        size: tuple[int, int],
    ) -> Float[Tensor, "height width"]:
        """What ``reduced`` makes [rows, columns] of each site's [patches, keys], enlarged: the mean over all sites."""
        by_grid: dict[tuple[int, ...], list[Tensor]] = {}
        for site, probs in self._stack(kind):
            small = reduced(site, probs.mean(dim=(0, 1)))
            by_grid.setdefault(tuple(small.shape), []).append(small)
        count = sum(map(len, by_grid.values()))
        sums = [torch.stack(maps).sum(dim=0)[None, None] for maps in by_grid.values()]
        large = [F.interpolate(small, size=size, mode="bicubic")[0, 0] for small in sums]
        return (torch.stack(large).sum(dim=0) / count).clamp(0, 1)

    def _stack(self, kind: Literal["self", "cross"]) -> list[tuple[AttentionSite, Tensor]]:
        found = [(site, probs) for site, probs in self.maps.items() if site.kind == kind]
        if not found:
            what = {"cross": "words (attn2)", "self": "patches (attn1)"}[kind]
            raise UsageError(f"no attention to {what} was traced: paint with trace=Trace(sites=…) that has some")
        return found


def _chosen(probs: Tensor, axis: int, name: str, chosen: Sequence[int]) -> Tensor:
    there = probs.shape[axis]
    if wrong := [number for number in chosen if not 0 <= number < there]:
        if there == 1:
            raise UsageError(
                f"{name} {wrong[0]} asked for, but {name}s were averaged: paint with Trace(per_{name}=True)"
            )
        raise UsageError(f"there is no {name} {wrong[0]}: choose from 0 to {there - 1}")
    return probs.index_select(axis, torch.tensor(chosen, device=probs.device))
