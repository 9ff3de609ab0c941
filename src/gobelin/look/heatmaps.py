"""Heat maps of one image: which word painted which pixel, and back; from its attention maps of many sites and heads."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gobelin.attention import AttentionMaps, AttentionSite, Sites, choose_sites
from gobelin.errors import UsageError
from gobelin.head_weights import HeadWeights
from gobelin.look.colour_map import overlay_values
from gobelin.look.sharp_maps import sharp_trace, sharpen
from gobelin.validation import validated
from gobelin.words import TokenKind, Word, Words, WordSpan

_EVEN = 1e-5  # shares that differ by less are rounding
_Numbers = Annotated[Sequence[int] | None, "numbers, as in [0, 3]"]
_Box = Annotated[tuple[int, int, int, int], "left, top, right and bottom in whole pixels"]
_KINDS: tuple[TokenKind, ...] = ("text", "bos", "eos", "padding")
_PARTS: tuple[TokenKind, ...] = _KINDS[1:]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Heat map of a word, a token or a patch over an image: for each pixel, the attention that it gets.

    ``raw`` [H, W] is in [0, 1]: the mean share of attention that the pixel's patch gives to it, less where sharpened;
    or, by head weights, the probability that the pixel shows what the word speaks of. ``unit`` tells which.
    """

    label: str
    raw: Float[Tensor, "height width"] = field(repr=False)
    image: Image.Image
    unit: Literal["share", "probability"] = "share"

    @property
    def values(self) -> Float[Tensor, "height width"]:
        """Scale ``raw`` for display, its least value to 0 and its greatest to 1; an even map is all 0."""
        low, high = self.raw.min(), self.raw.max()
        return (self.raw - low) / (high - low) if high - low > _EVEN else torch.zeros_like(self.raw)

    def mask(self, threshold: float = 0.4) -> Tensor:
        """Threshold ``values``: bool [H, W], True above the threshold (DAAM's τ)."""
        return self.values > threshold

    def overlay(self, size: int | None = None) -> Image.Image:
        """Draw the map in colour over the image in grey; ``size`` is the longer side in pixels, by default its own."""
        return overlay_values(self.image, self.values, size)

    def __repr__(self) -> str:
        height, width = self.raw.shape
        return f"HeatMap({self.label!r}, {width}×{height}, {self.unit} {self.raw.min():.3f} to {self.raw.max():.3f})"

    def _repr_png_(self) -> bytes | None:
        return self.overlay(max(256, *self.image.size))._repr_png_()


@dataclass(frozen=True, kw_only=True)
class MapArrays:
    """Arrays of an image's heat maps: words to pixels, pixels to words, patches to patches; float32, in [0, 1].

    ``words`` [W] names the words. ``words_to_image`` [W, H, W′] is each word's map, ``raw`` of a :class:`HeatMap`;
    ``image_to_words`` [H, W′, W] is what of a pixel's attention to these words goes to each, and sums to 1, or is 0
    where none gets any. ``patches_to_patches`` [rows, columns, rows, columns] is the self-attention (attn1) from the
    patches of the first two axes to those of the last two, a mean over the finest sites that were traced; None if none
    was.
    """

    words: list[str]
    words_to_image: NDArray[np.float32]
    image_to_words: NDArray[np.float32]
    patches_to_patches: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class HeatMaps:
    """Heat maps of one image, one for each word of its prompt: ``heatmaps["circle"]`` is a :class:`HeatMap`.

    ``words`` are the prompt's. ``maps`` are by site, [steps, heads, patches, keys], float32, with 1 where steps or
    heads were averaged. ``latent_size`` is (h, w). If ``sharp``, words' maps are :meth:`sharpened`, by the
    ``head_weights`` where there are such. ``also_traced`` and ``negative_traced`` are the heat maps of words beside the
    prompt and of the negative prompt, None where not traced, and ``around`` is the prompt beside which words were.
    """

    words: Words
    maps: AttentionMaps
    latent_size: tuple[int, int]
    image: Image.Image
    sharp: bool = False
    head_weights: HeadWeights | None = field(default=None, repr=False)
    around: "HeatMaps | None" = field(default=None, repr=False)
    also_traced: "HeatMaps | None" = field(default=None, repr=False)
    negative_traced: "HeatMaps | None" = field(default=None, repr=False)

    @property
    def also(self) -> "HeatMaps":
        """The heat maps of words that were looked for beside the prompt; raises :class:`UsageError` without any.

        A word's share is what it would take of a patch's attention if it stood beside the prompt, alone of these words
        (:func:`gobelin.attention.extra_shares`), so that shares of several do not add up.
        """
        if self.also_traced is None:
            raise UsageError("no words were looked for beside the prompt: name some by also=")
        return self.also_traced

    @property
    def negative(self) -> "HeatMaps":
        """The heat maps of the negative prompt; raises :class:`UsageError` where they were not traced."""
        if self.negative_traced is None:
            raise UsageError(
                "the negative prompt was not traced: paint with trace=Trace(negative=True), and a guidance that asks "
                "for it"
            )
        return self.negative_traced

    def __repr__(self) -> str:
        return f"HeatMaps(words={self.words.text!r}, sites={len(self.maps)}, size={self.image.size})"

    def _repr_html_(self) -> str:
        from gobelin.look.page import word_map_element  # which is made of heat maps

        return word_map_element(self)

    def __getitem__(self, key: Word) -> HeatMap:
        """Look up a word or a phrase, wherever it stands; a pair for one occurrence, 0 the first; a word by its number.

        Case does not matter. What is no word of the prompt is looked up in :attr:`also`; "bos", "eos" and "padding" are
        these parts then. Raises :class:`UsageError`, which lists the prompt's words, for any other.
        """
        if not self.words.has(key):
            if self.also_traced is not None and self.also_traced.words.has(key):
                return self.also_traced[key]
            for part in _PARTS:
                if isinstance(key, str) and key.lower() == part:
                    return self.part(part)
        tokens = self.words.tokens(key)
        label = self.words.spans[key].word if isinstance(key, int) else key if isinstance(key, str) else key[0]
        return self._map(label, tokens)

    def token(self, position: int) -> HeatMap:
        """Look up one token by its position; BOS is 0. Its map is never by head weights, which are of words."""
        if not 0 <= position < self.words.length:
            raise UsageError(f"there is no token {position}: positions are 0 to {self.words.length - 1}")
        return self.unweighted()._map(f"token {position}", (position,))

    def part(self, part: TokenKind) -> HeatMap:
        """Look up a part of the token sequence: "text", "bos", "eos" or "padding", of all chunks of a long prompt.

        Its map is never by head weights, which are of words.
        """
        return self.unweighted()._map(part.upper() if part in ("bos", "eos") else part, self.words.part(part))

    def select(
        self, *, sites: Sites = None, heads: Sequence[int] | None = None, steps: Sequence[int] | None = None
    ) -> "HeatMaps":
        """Select sites (as :func:`gobelin.attention.choose_sites`; None for all), heads and steps.

        Heads and steps can be selected if they were kept apart: ``trace=Trace(per_head=True, per_step=True)``. Head
        weights are of all their sites and heads: of some, maps are sharp as without them.
        """
        kept = self.maps if sites is None else dict.fromkeys(choose_sites(tuple(self.maps), sites))
        maps = {site: self.maps[site] for site in kept}
        for axis, name, chosen in ((0, "step", steps), (1, "head", heads)):
            validated(f"{name}s", chosen, _Numbers)
            if chosen is not None:
                maps = {site: _chosen(probs, axis, name, chosen) for site, probs in maps.items()}
        unequal = (
            self.negative_traced is not None and self.negative_traced.steps != self.steps
        )  # guidance of some steps
        whole = replace(self, negative_traced=None) if steps is not None and unequal else self
        weights = self.head_weights if sites is None and heads is None else None
        around = None if self.around is None else self.around.select(sites=sites, heads=heads, steps=steps)
        found = whole._like(
            lambda one: one.select(sites=sites, heads=heads, steps=steps),
            maps=maps,
            head_weights=weights,
            around=around,
        )
        if found.sharp:
            found._require_own()
        return found

    def without(self, *parts: TokenKind) -> "HeatMaps":
        """Leave out the shares of BOS, EOS or padding, and make the others sum to 1 again.

        Words beside the prompt then stand beside what is left of it. Head weights are of whole maps: without a part
        maps are sharp as without them.
        """
        gone = [position for part in parts for position in self.words.part(part)]
        maps = dict(self.maps)
        sums: AttentionMaps = {}
        for site, probs in self.maps.items():
            if site.kind == "cross":
                left = probs.clone()
                left[..., gone] = 0
                sums[site] = left.sum(dim=-1, keepdim=True)
                maps[site] = left / sums[site].clamp(min=torch.finfo(left.dtype).tiny)
        also = None if self.also_traced is None else self.also_traced._beside_less(sums)
        negative = None if self.negative_traced is None else self.negative_traced.without(*parts)
        weights = self.head_weights if not parts else None
        return replace(self, maps=maps, head_weights=weights, also_traced=also, negative_traced=negative)

    def _beside_less(self, sums: AttentionMaps) -> "HeatMaps":
        """Put words beside a prompt of whose shares only these ``sums`` are left: of a share s, s / (s + (1 − s)·sum).

        Exact head by head and step by step; of means it is that of the means.
        """
        maps = dict(self.maps)
        for site, left in sums.items():
            maps[site] = torch.zeros_like(self.maps[site])
            for span in self.words.spans:
                part = self.maps[site][..., list(span.tokens)]
                share = part.sum(dim=-1, keepdim=True)
                maps[site][..., list(span.tokens)] = part / (share + (1 - share) * left).clamp(min=_EVEN)
        return replace(self, maps=maps, head_weights=None, around=None)

    def _like(self, change: "Callable[[HeatMaps], HeatMaps]", **fields: Any) -> "HeatMaps":
        """Replace fields, and change in the same way what was traced beside the prompt."""
        inner = {"also_traced": self.also_traced, "negative_traced": self.negative_traced}
        return replace(self, **fields, **{name: None if one is None else change(one) for name, one in inner.items()})

    def sharpened(self, head_weights: HeadWeights | None = None) -> "HeatMaps":
        """Sharpen words' maps: a patch keeps its share of a word as far as the patches that it draws on have it too.

        At each site the share is multiplied by what self-attention (attn1, a mean over the sites with the same patches)
        gathers of it, over its maximum. With ``head_weights``, for maps whose heads are apart, a map is the probability
        that a patch shows what the word speaks of (:class:`gobelin.head_weights.HeadWeights`). ``maps``,
        :meth:`shares`, :meth:`entropy` and :meth:`daam` stay as they are. Raises :class:`UsageError` if self-attention
        was not traced.
        """
        self._require_own()
        around = None if self.around is None else self.around.sharpened(head_weights)
        return self._like(lambda one: one.sharpened(head_weights), sharp=True, head_weights=head_weights, around=around)

    def _require_own(self) -> None:
        """Raise :class:`UsageError` where there is cross-attention without self-attention beside it."""
        traced = {site.grid(*self.latent_size) for site in self.maps if site.kind == "self"}
        for site in self.maps:
            if site.kind == "cross" and site.grid(*self.latent_size) not in traced:
                raise UsageError(f"no attention to patches was traced where {site.name} is: trace its attn1 too")

    def unweighted(self) -> "HeatMaps":
        """Return sharp maps as they are without head weights; these maps, where there are none."""
        if self.head_weights is None:
            return self
        return self.select(sites=sharp_trace(tuple(self.maps), self.latent_size).sites)

    def words_at(self, x: int, y: int) -> list[tuple[WordSpan, float]]:
        """Rank the words behind the pixel at column ``x``, row ``y``, each with its share among them."""
        for name, place in (("x", x), ("y", y)):
            validated(name, place, int)
        return self.words_in((x, y, x + 1, y + 1))

    def words_in(self, box: tuple[int, int, int, int]) -> list[tuple[WordSpan, float]]:
        """Rank the words behind a box (left, top, right, bottom) in pixels, right and bottom exclusive."""
        left, top, right, bottom = validated("the box", tuple(box), _Box)
        width, height = self.image.size
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise UsageError(
                f"the region {left}, {top} to {right}, {bottom} is not in the image of {width}×{height} pixels"
            )
        shares = [
            self._map(span.word, span.tokens).raw[top:bottom, left:right].mean().item() for span in self.words.spans
        ]
        total = sum(shares) or 1.0
        ranked = zip(self.words.spans, (share / total for share in shares), strict=True)
        return sorted(ranked, key=lambda pair: -pair[1])

    def patches_for(self, x: int, y: int) -> HeatMap:
        """Map the patches that the patch at pixel (x, y) draws on: its self-attention (attn1), if that was traced."""
        width, height = self.image.size
        if not (0 <= x < width and 0 <= y < height):
            raise UsageError(f"the pixel {x}, {y} is not in the image of {width}×{height} pixels")

        def seen(site: AttentionSite, probs: Tensor) -> Tensor:
            rows, columns = site.grid(*self.latent_size)
            query = (y * rows // height) * columns + x * columns // width
            return probs[query].reshape(rows, columns)

        raw = self._mean_over_sites("self", seen, (height, width))
        return HeatMap(label=f"patch at {x}, {y}", raw=raw, image=self.image)

    def shares(self) -> dict[str, float]:
        """Compute the mean shares of attention that go to the text, to BOS, to EOS and to padding, over all chunks.

        They sum to 1, unless a control changed that.
        """
        mean = torch.stack([probs.mean(dim=(0, 1, 2)) for _, probs in self._of_kind("cross")]).mean(dim=0)
        return {part: mean[list(self.words.part(part))].sum().item() for part in _KINDS}

    def entropy(self) -> float:
        """Compute the mean entropy of a patch's attention over tokens, in nats."""
        return torch.stack([torch.special.entr(p).sum(dim=-1).mean() for _, p in self._of_kind("cross")]).mean().item()

    def daam(self, key: Word) -> HeatMap:
        """DAAM: aggregate the map exactly as its package does, from heads kept apart: ``trace=Trace(per_head=True)``.

        Every head of every layer is enlarged to the latents' size by bicubic interpolation and clamped at 0; the mean
        is taken over heads and layers, then over the word's tokens; bicubic interpolation once more gives the
        image's size (``GlobalHeatMap.compute_word_heat_map`` and ``expand_as`` of the daam package). The middle block
        and patches of 8×8 latents are left out, as there.
        """
        tokens = list(self.words.tokens(key))
        layers = []
        for site, probs in self._of_kind("cross"):
            if site.name.startswith("mid_block") or site.downscale == 8:
                continue
            rows, columns = site.grid(*self.latent_size)
            heads = probs.sum(dim=0)[..., tokens].permute(0, 2, 1).reshape(-1, 1, rows, columns)
            large = F.interpolate(heads, size=self.latent_size, mode="bicubic").clamp(min=0)
            layers.append(large.reshape(-1, len(tokens), *self.latent_size))
        if not layers:
            raise UsageError("DAAM leaves out the middle block and patches of 8×8 latents: trace other sites too")
        mean = torch.cat(layers).mean(dim=0).mean(dim=0)
        raw = F.interpolate(mean[None, None], size=self.image.size[::-1], mode="bicubic")[0, 0]
        return HeatMap(label=str(key), raw=raw, image=self.image)

    def stack_words(self, keys: Sequence[Word]) -> Float[Tensor, "words height width"]:
        """Stack the ``raw`` maps of several words."""
        return torch.stack([self[key].raw for key in keys])

    def masks(self, words: Sequence[Word] | None = None, threshold: float = 0.4) -> Bool[Tensor, "words height width"]:
        """Mask several words, by default all of the prompt: True where a word's map is above ``threshold``.

        The threshold is a share of the map's range, DAAM's τ, as in :meth:`HeatMap.mask`.
        """
        keys = range(len(self.words)) if words is None else words
        masks = [self[key].mask(threshold) for key in keys]
        return torch.stack(masks) if masks else torch.zeros(0, *self._size, dtype=torch.bool)

    def arrays(self, words: Sequence[Word] | None = None) -> MapArrays:
        """Compute all directions at once as arrays: words → image, image → words, patches → patches.

        ``words`` chooses and orders the words, by default all of the prompt. See :class:`MapArrays` for the shapes.
        """
        heatmaps = [self[key] for key in (range(len(self.words)) if words is None else words)]
        shares = torch.stack([one.raw for one in heatmaps]) if heatmaps else torch.zeros(0, *self._size)
        among = shares / shares.sum(dim=0).clamp(min=torch.finfo(shares.dtype).tiny)
        patches = None
        if own := [(site.grid(*self.latent_size), probs) for site, probs in self.maps.items() if site.kind == "self"]:
            finest = max((grid for grid, _ in own), key=math.prod)
            mean = torch.stack([probs.mean(dim=(0, 1)) for grid, probs in own if grid == finest]).mean(dim=0)
            patches = mean.reshape(*finest, *finest).numpy()
        return MapArrays(
            words=[one.label for one in heatmaps],
            words_to_image=shares.numpy(),
            image_to_words=among.permute(1, 2, 0).contiguous().numpy(),
            patches_to_patches=patches,
        )

    @property
    def _size(self) -> tuple[int, int]:
        return self.image.height, self.image.width

    @property
    def steps(self) -> int:
        """Number of steps that were kept apart and selected; 1 where they were averaged, or nothing was traced."""
        return next((maps.shape[0] for maps in self.maps.values()), 1)

    def token_share(self, tokens: Sequence[int], size: tuple[int, int]) -> Float[Tensor, "height width"]:
        """Compute the mean share of these tokens together, sharpened if ``sharp``, at a size (height, width).

        By head weights it is a probability: log-odds of patches, enlarged.
        """
        if self.sharp and self.head_weights is not None:
            return self.token_shares([tokens], size)[0]

        def shared(site: AttentionSite, probs: Tensor) -> Tensor:
            share = probs[:, list(tokens)].sum(dim=-1)
            grid = site.grid(*self.latent_size)
            if self.sharp:
                own = [
                    seen.mean(dim=(0, 1)) for at, seen in self._of_kind("self") if at.grid(*self.latent_size) == grid
                ]
                share = sharpen(share, torch.stack(own).mean(dim=0))
            return share.reshape(grid)

        return self._mean_over_sites("cross", shared, size)

    def token_shares(
        self, groups: Sequence[Sequence[int]], size: tuple[int, int]
    ) -> Float[Tensor, "groups height width"]:
        """Compute :meth:`token_share` of several groups of tokens, one at least; by head weights of all at once."""
        if not self.sharp or self.head_weights is None:
            return torch.stack([self.token_share(tokens, size) for tokens in groups])
        (grid,) = {site.grid(*self.latent_size) for site in self.maps}
        small = self._log_odds(self.head_weights, groups).unflatten(-1, grid)
        return F.interpolate(small[:, None], size=size, mode="bicubic")[:, 0].sigmoid()

    def _log_odds(self, weights: HeadWeights, groups: Sequence[Sequence[int]]) -> Float[Tensor, "groups patches"]:
        """Compute the log-odds that patches show what each group of tokens speaks of, by head weights."""

        def heads(maps: AttentionMaps, names: Iterable[str]) -> Tensor:
            by_name = {site.name: probs.mean(dim=0) for site, probs in maps.items()}
            return torch.cat([by_name[name] for name in names])

        cross, prompt = heads(self.maps, weights.cross), self.around or self
        words = torch.stack([cross[..., list(tokens)].sum(dim=-1) for tokens in groups])
        beside = cross if prompt is self else heads(prompt.maps, weights.cross)
        bos = beside[..., list(prompt.words.part("bos"))].sum(dim=-1)[None]
        # A word beside the prompt takes its share from all that stands there.
        bos = bos if prompt is self else bos * (1 - words)
        return weights.logits(words, bos, heads(self.maps, weights.own))

    def _map(self, label: str, tokens: Sequence[int]) -> HeatMap:
        unit = "share" if self.head_weights is None else "probability"
        return HeatMap(label=label, raw=self.token_share(tokens, self._size), image=self.image, unit=unit)

    def _mean_over_sites(
        self,
        kind: Literal["self", "cross"],
        reduced: Callable[[AttentionSite, Tensor], Tensor],
        size: tuple[int, int],
    ) -> Float[Tensor, "height width"]:
        """Reduce each site's [patches, keys] to [rows, columns], enlarge them, and take the mean over all sites."""
        by_grid: dict[tuple[int, ...], list[Tensor]] = {}
        for site, probs in self._of_kind(kind):
            small = reduced(site, probs.mean(dim=(0, 1)))
            by_grid.setdefault(tuple(small.shape), []).append(small)
        count = sum(map(len, by_grid.values()))
        sums = [torch.stack(maps).sum(dim=0)[None, None] for maps in by_grid.values()]
        large = [F.interpolate(small, size=size, mode="bicubic")[0, 0] for small in sums]
        return (torch.stack(large).sum(dim=0) / count).clamp(0, 1)

    def _of_kind(self, kind: Literal["self", "cross"]) -> list[tuple[AttentionSite, Tensor]]:
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
