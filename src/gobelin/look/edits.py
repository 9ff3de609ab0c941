"""Painting by other attention: what changes when words are looked at more, less, elsewhere, or as in another picture.

Every function makes :class:`gobelin.attention.Edit` s, which compose by standing in one list. Words are looked up in
a prompt's :class:`gobelin.tokenizer.Words`. An edit concerns the pictures ``rows`` of a batch, None being all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gobelin.attention import AttentionMaps, AttentionSite, Edit, Sites
from gobelin.errors import UsageError
from gobelin.tokenizer import Word, Words

SHARED_PATCHES = 16 * 16
"""Self-attention is taken over from another picture where patches are at most this many, as in prompt-to-prompt."""


def reweighted(words: Words, weights: Mapping[Word, float], rows: Sequence[int] | None = None) -> Edit:
    """Look at words so many times as much: 0 not at all, 1 as before (prompt-to-prompt's re-weighting, section 3.3).

    Rows of probabilities do not sum to 1 any more: what is added is added to what the patch becomes. Raises
    :class:`UsageError` for a word that is not there and for a weight below 0.
    """
    scale = torch.ones(words.length)
    for word, weight in weights.items():
        if weight < 0:
            raise UsageError(f"the weight of {word!r} is {weight}: give 0 (not at all) or more")
        scale[list(words.tokens(word))] = weight
    return Edit(change=lambda site, probs: _in_rows(probs, rows, probs * scale.to(probs)))


def silenced(words: Words, *unseen: Word, rows: Sequence[int] | None = None) -> Edit:
    """Do not look at these words: the attention they had goes to the others in proportion."""
    gone = [token for word in unseen for token in words.tokens(word)]

    def change(site: AttentionSite, probs: Tensor) -> Tensor:
        left = probs.clone()
        left[..., gone] = 0
        return _in_rows(probs, rows, left / left.sum(dim=-1, keepdim=True).clamp(min=1e-9))

    return Edit(change=change)


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where a word may be looked at from: a mask [H, W] of any size, 1 inside and 0 outside."""

    word: Word
    mask: Float[Tensor, "height width"]

    @classmethod
    def box(cls, word: Word, left: float, top: float, right: float, bottom: float) -> "Region":
        """A box in shares of the picture's width and height, 0 to 1."""
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UsageError(
                f"the region {left}, {top} to {right}, {bottom} of {word!r} is not in the picture: give left < right "
                "and top < bottom, as shares from 0 to 1"
            )
        side = 960  # 64 · 15: edges at thirds, fifths and powers of two fall between patches
        mask = torch.zeros(side, side)
        mask[round(top * side) : round(bottom * side), round(left * side) : round(right * side)] = 1
        return cls(word=word, mask=mask)


def regional(
    words: Words,
    regions: Sequence[Region],
    latent_size: tuple[int, int],
    strength: float = 3.0,
    until: float = 0.5,
    rows: Sequence[int] | None = None,
) -> Edit:
    """Have words painted where they are wanted: inside looked at ``strength`` times as much, outside not at all.

    It holds up to the share ``until`` of the way, when what goes where is settled. ``latent_size`` is (h, w).
    """
    if strength <= 0:
        raise UsageError(f"the strength is {strength}: give more than 0")
    wanted = [(list(words.tokens(region.word)), region.mask) for region in regions]

    def change(site: AttentionSite, probs: Tensor) -> Tensor:
        grid = site.grid(*latent_size)
        weights = torch.ones(grid[0] * grid[1], words.length)
        for tokens, mask in wanted:
            inside = F.interpolate(mask[None, None].float(), size=grid, mode="area").flatten()
            weights[:, tokens] = strength * inside[:, None]
        changed = probs * weights.to(probs)
        return _in_rows(probs, rows, changed / changed.sum(dim=-1, keepdim=True).clamp(min=1e-9))

    return Edit(change=change, end=until)


def followed(
    source: Words,
    target: Words,
    cross: float = 0.8,
    own: float = 0.4,
    latent_size: tuple[int, int] | None = None,
    rows: tuple[int, int] = (0, 1),
) -> list[Edit]:
    """Prompt-to-prompt (Hertz et al. 2022, arXiv 2208.01626): paint a changed prompt, keep the picture.

    The picture ``rows[1]``, painted from ``target``, looks at its words as ``rows[0]`` looks at the words of ``source``
    that stand in their place, up to the share ``cross`` of the way; words that are new look for themselves. Up to the
    share ``own`` its patches look at each other as the other picture's do, where they are 16×16 at most.
    """
    for name, share in (("cross", cross), ("own", own)):
        if not 0 <= share <= 1:
            raise UsageError(f"{name} is {share}: give a share of the way from 0 to 1")
    first, second = rows
    mapping = alignment(source, target)
    new = mapping.sum(dim=0) == 0

    def words_followed(site: AttentionSite, probs: Tensor) -> Tensor:
        changed = probs.clone()
        taken = probs[first] @ mapping.to(probs)
        changed[second] = torch.where(new.to(probs.device), probs[second], taken)
        return changed

    def patches_followed(site: AttentionSite, probs: Tensor) -> Tensor:
        if probs.shape[-1] > SHARED_PATCHES:
            return probs
        changed = probs.clone()
        changed[second] = probs[first]
        return changed

    return [
        Edit(change=words_followed, end=cross),
        Edit(change=patches_followed, sites=lambda site: site.kind == "self", end=own),
    ]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Something that attention maps should be like: latents are moved to lessen ``loss(maps)`` [B] before each step.

    They move by ``strength`` · loss in the direction of steepest descent, root mean square over a picture's latents,
    up to the share ``end`` of the way.
    """

    loss: Callable[[AttentionMaps], Tensor]
    sites: Sites = None
    strength: float = 0.3
    end: float = 0.5


def excited(words: Words, *wanted: Word, latent_size: tuple[int, int], strength: float = 0.3, end: float = 0.5) -> Wish:
    """Attend-and-excite (Chefer et al. 2023, arXiv 2301.13826): no word may be left out.

    The loss is one minus the greatest attention that the most neglected of the wanted words has at any patch. As in
    the paper it is shared out among the words alone, over the finest sites, and smoothed by a 3×3 Gaussian; but how far
    latents move does not depend on the gradient's own size.
    """
    tokens = [list(words.tokens(word)) for word in wanted]
    if not tokens:
        raise UsageError("no word given: say which must not be left out")
    kernel = torch.tensor([0.1065, 0.7870, 0.1065])  # σ = 0.5

    def loss(maps: AttentionMaps) -> Tensor:
        finest = min(site.downscale for site in maps)
        shown = [(site, probs) for site, probs in maps.items() if site.downscale == finest]
        probs = torch.stack([probs for _, probs in shown]).mean(dim=0)[..., 1 : words.end]
        probs = torch.softmax(100 * probs, dim=-1)
        grid = shown[0][0].grid(*latent_size)
        peaks = []
        for places in tokens:
            share = probs[..., [place - 1 for place in places]].sum(dim=-1).reshape(-1, 1, *grid)
            padded = F.pad(share, (1, 1, 1, 1), mode="replicate")
            smooth = F.conv2d(padded, (kernel[:, None] * kernel)[None, None].to(padded))
            peaks.append(smooth.amax(dim=(1, 2, 3)))
        return 1 - torch.stack(peaks).amin(dim=0)

    return Wish(loss=loss, strength=strength, end=end)


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Prompt-to-prompt's local blend: outside of some words' pixels, one picture of a batch is another one.

    ``tokens`` are those of the words in the pictures ``rows``, (source, target); their pixels are where either's map,
    averaged over the steps so far, exceeds the share ``threshold`` of its maximum. It begins at the share ``start`` of
    the way.
    """

    tokens: tuple[Sequence[int], Sequence[int]]
    latent_size: tuple[int, int]
    threshold: float = 0.3
    start: float = 0.2
    rows: tuple[int, int] = (0, 1)


def blended(source: Words, target: Words, words: Sequence[Word], latent_size: tuple[int, int]) -> Blend:
    """A :class:`Blend` of two pictures by words that one or both of the prompts have.

    Raises :class:`UsageError` for a word that neither has.
    """
    found: tuple[list[int], list[int]] = ([], [])
    for word in words:
        missing = []
        for prompt, tokens in zip((source, target), found, strict=True):
            try:
                tokens += prompt.tokens(word)
            except UsageError as error:
                missing.append(error)
        if len(missing) == 2:
            raise missing[0]
    return Blend(tokens=found, latent_size=latent_size)


class Blending:
    """A :class:`Blend` while it is painted: ``edit`` watches the words, :meth:`applied` puts the latents together."""

    def __init__(self, blend: Blend):
        self.edit = Edit(change=self._watched)
        self._blend = blend
        self._seen = torch.zeros(2, *blend.latent_size)

    def applied(self, latents: Float[Tensor, "batch channels h w"], way: float) -> Float[Tensor, "batch channels h w"]:
        """The latents at this share of the way, the target's being the source's outside of the words' pixels."""
        if way < self._blend.start:
            return latents
        source, target = self._blend.rows
        result = latents.clone()
        result[target] = torch.where(self.mask().to(latents.device), latents[target], latents[source])
        return result

    def mask(self) -> Tensor:
        """The words' pixels, bool [h, w]."""
        most = self._seen.amax(dim=(1, 2), keepdim=True).clamp(min=1e-9)
        return (self._seen / most > self._blend.threshold).any(dim=0)

    def _watched(self, site: AttentionSite, probs: Tensor) -> Tensor:
        grid = site.grid(*self._blend.latent_size)
        for number, (row, tokens) in enumerate(zip(self._blend.rows, self._blend.tokens, strict=True)):
            share = probs[row].mean(dim=0)[:, list(tokens)].sum(dim=-1).reshape(1, 1, *grid)
            self._seen[number] += F.interpolate(share, size=self._blend.latent_size, mode="bilinear")[0, 0].cpu()
        return probs


def alignment(source: Words, target: Words) -> Float[Tensor, "length length"]:
    """What each token of ``target`` takes over from the tokens of ``source``; nothing, where its word is new.

    Equal words in order are each other's; as many changed words in a row as there were are each other's in turn,
    and share out evenly what they get where they have more or fewer tokens. BOS, EOS and padding are each other's.
    """
    mapping = torch.zeros(source.length, target.length)
    mapping[0, 0] = 1
    after = min(source.length - source.end, target.length - target.end)
    for offset in range(after):
        mapping[source.end + offset, target.end + offset] = 1
    for position in range(target.end + after, target.length):
        mapping[source.length - 1, position] = 1
    spoken = [[span.word.lower() for span in words.spans] for words in (source, target)]
    for kind, i, j, k, n in SequenceMatcher(None, *spoken, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and j - i == n - k):
            for before, now in zip(source.spans[i:j], target.spans[k:n], strict=True):
                if len(before.tokens) == len(now.tokens):
                    mapping[before.tokens, now.tokens] = 1
                else:
                    for token in now.tokens:
                        mapping[before.tokens, token] = 1 / len(now.tokens)
    return mapping


def _in_rows(probs: Tensor, rows: Sequence[int] | None, changed: Tensor) -> Tensor:
    """``changed`` in these rows of the batch, ``probs`` in the others."""
    if rows is None:
        return changed
    result = probs.clone()
    result[list(rows)] = changed[list(rows)]
    return result
