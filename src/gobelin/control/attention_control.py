"""Painting by other attention: what changes when words are looked at more, less, elsewhere, or as in another picture.

What these functions make composes by standing in one list. Words are looked up in a prompt's
:class:`gobelin.tokenizer.Words`. Edits concern the pictures ``rows`` of a batch, None being all; where places matter,
``latent_size`` (h, w) is that of :meth:`gobelin.pipeline.Pipeline.latent_size`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gobelin.attention import AttentionSite, Edit
from gobelin.control.alignment import alignment, counterparts
from gobelin.errors import UsageError
from gobelin.tokenizer import Word, Words

COARSE_PATCHES = 16 * 16
"""Prompt-to-prompt and attend-and-excite look where patches are this many: layout is settled there, at less cost."""


def reweighted(words: Words, weights: Mapping[Word, float], rows: Sequence[int] | None = None) -> Edit:
    """Look at words so many times as much: 0 not at all, 1 as before (prompt-to-prompt's re-weighting, section 3.3).

    Rows of probabilities do not sum to 1 any more: what is added is added to what the patch becomes. Raises
    :class:`UsageError` for a word that is not there and for a weight below 0.
    """
    scale = torch.ones(words.length)
    for word, weight in weights.items():
        if not 0 <= weight < math.inf:
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

    A word with several regions may be in any of them. It holds until the share ``until`` of the way, when what goes
    where is settled.
    """
    if not 0 < strength < math.inf:
        raise UsageError(f"the strength is {strength}: give more than 0")
    wanted = [(list(words.tokens(region.word)), region.mask.cpu().float()) for region in regions]

    def change(site: AttentionSite, probs: Tensor) -> Tensor:
        grid = grid_of(site, latent_size, probs)
        inside = torch.zeros(grid[0] * grid[1], words.length)
        for tokens, mask in wanted:
            covered = F.interpolate(mask[None, None], size=grid, mode="area").flatten()
            inside[:, tokens] = torch.maximum(inside[:, tokens], covered[:, None])
        placed = [token for tokens, _ in wanted for token in tokens]
        weights = torch.ones_like(inside)
        weights[:, placed] = strength * inside[:, placed]
        changed = probs * weights.to(probs)
        return _in_rows(probs, rows, changed / changed.sum(dim=-1, keepdim=True).clamp(min=1e-9))

    return Edit(change=change, end=until)


def followed(
    source: Words,
    target: Words,
    latent_size: tuple[int, int],
    cross: float = 0.8,
    own: float = 0.4,
    rows: tuple[int, int] = (0, 1),
) -> list[Edit]:
    """Prompt-to-prompt (Hertz et al. 2022, arXiv 2208.01626): paint a changed prompt, keep the picture.

    The picture ``rows[1]``, painted from ``target``, looks at its words as ``rows[0]`` looks at the words of ``source``
    that stand in their place, until the share ``cross`` of the way; words that are new look for themselves. Until the
    share ``own`` its patches look at each other as the other picture's do, where they are 16×16 at most.
    """
    for name, share in (("cross", cross), ("own", own)):
        if not 0 <= share <= 1:
            raise UsageError(f"{name} is {share}: give a share of the way from 0 to 1")
    first, second = rows
    mapping = alignment(source, target)
    new = mapping.sum(dim=0) == 0

    def words_followed(site: AttentionSite, probs: Tensor) -> Tensor:
        require_rows(probs, rows)
        changed = probs.clone()
        taken = probs[first] @ mapping.to(probs)
        changed[second] = torch.where(new.to(probs.device), probs[second], taken)
        return changed

    def patches_followed(site: AttentionSite, probs: Tensor) -> Tensor:
        require_rows(probs, rows)
        changed = probs.clone()
        changed[second] = probs[first]
        return changed

    return [
        Edit(change=words_followed, end=cross),
        Edit(change=patches_followed, sites=lambda site: site.kind == "self" and is_coarse(site, latent_size), end=own),
    ]


@dataclass(frozen=True, kw_only=True)
class Push:
    """Push a picture of a batch further from another's words to its own.

    Guidance goes from no words to a prompt; for the picture ``rows[1]`` this adds ``strength`` times the way from the
    words of ``rows[0]`` to its own: what is *different* in the prompt grows. It costs one more pass of the U-Net a
    step, for that picture alone.
    """

    strength: float
    rows: tuple[int, int] = (0, 1)


@dataclass(frozen=True, kw_only=True)
class FlowEdit:
    """Change finished pictures in place of painting from noise (:func:`gobelin.control.flow_edit.flow_edit`).

    ``latents`` are the pictures'. The batch has twice as many: first those as they are, each with a prompt that says
    what is on it, then what becomes of each, with the changed prompt. Of the way from noise to picture the share
    ``strength`` is gone, the end of it: less changes less. More ``gain`` holds on to what has changed already; 0 is the
    method of the paper.
    """

    latents: Float[Tensor, "pictures channels h w"]
    strength: float = 1.0
    gain: float = 0.45


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Prompt-to-prompt's local blend: outside of some words' pixels, one picture of a batch is another one.

    ``tokens`` are those of the words in the pictures ``rows``, (source, target); their pixels are where either's map, a
    mean over the steps so far and over the sites with at most 16×16 patches, widened by a patch, exceeds the share
    ``threshold`` of its maximum. It begins at the share ``start`` of the way.
    """

    tokens: tuple[Sequence[int], Sequence[int]]
    latent_size: tuple[int, int]
    threshold: float = 0.3
    start: float = 0.2
    rows: tuple[int, int] = (0, 1)


def changed_words(source: Words, target: Words) -> tuple[list[int], list[int]]:
    """The tokens of the words that one of two prompts has and the other has not, in (source, target)."""
    same = [(one, other) for one, other in counterparts(source, target) if one.word.lower() == other.word.lower()]
    kept = [{span for span, _ in same}, {span for _, span in same}]
    old, new = (
        [token for span in words.spans if span not in spans for token in span.tokens]
        for words, spans in zip((source, target), kept, strict=True)
    )
    return old, new


def tokens_of(source: Words, target: Words, words: Sequence[Word]) -> tuple[list[int], list[int]]:
    """The tokens in (source, target) of words that one or both of the prompts have.

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
    return found


class Blending:
    """A :class:`Blend` while it is painted: ``edit`` watches the words, :meth:`applied` puts the latents together."""

    def __init__(self, blend: Blend):
        self.edit = Edit(change=self._watched, sites=self._watches)
        self._blend = blend
        self._seen = torch.zeros(2, *blend.latent_size)

    def applied(self, latents: Float[Tensor, "batch channels h w"], way: float) -> Float[Tensor, "batch channels h w"]:
        """The latents at this share of the way, the target's being the source's outside of the words' pixels."""
        if way < self._blend.start or not self._seen.any():
            return latents
        source, target = self._blend.rows
        result = latents.clone()
        result[target] = torch.where(self.mask().to(latents.device), latents[target], latents[source])
        return result

    def mask(self) -> Tensor:
        """The words' pixels, bool [h, w]."""
        wide = F.max_pool2d(self._seen, kernel_size=3, stride=1, padding=1)
        most = wide.amax(dim=(1, 2), keepdim=True).clamp(min=1e-9)
        return (wide / most > self._blend.threshold).any(dim=0)

    def _watches(self, site: AttentionSite) -> bool:
        return site.kind == "cross" and is_coarse(site, self._blend.latent_size)

    def _watched(self, site: AttentionSite, probs: Tensor) -> Tensor:
        require_rows(probs, self._blend.rows)
        grid = grid_of(site, self._blend.latent_size, probs)
        for number, (row, tokens) in enumerate(zip(self._blend.rows, self._blend.tokens, strict=True)):
            share = probs[row].mean(dim=0)[:, list(tokens)].sum(dim=-1).reshape(1, 1, *grid)
            self._seen[number] += F.interpolate(share, size=self._blend.latent_size, mode="bilinear")[0, 0].cpu()
        return probs


def is_coarse(site: AttentionSite, latent_size: tuple[int, int]) -> bool:
    """Whether its patches are few enough for what settles layout."""
    return math.prod(site.grid(*latent_size)) <= COARSE_PATCHES


def grid_of(site: AttentionSite, latent_size: tuple[int, int], probs: Tensor) -> tuple[int, int]:
    """The rows and columns of a site's patches; :class:`UsageError` where its probabilities have other ones."""
    grid = site.grid(*latent_size)
    if math.prod(grid) != probs.shape[-2]:
        raise UsageError(
            f"the edit is for latents of {latent_size[0]}×{latent_size[1]}, but {site.name} has {probs.shape[-2]} "
            "patches: give the latent_size of the picture that is painted"
        )
    return grid


def require_rows(probs: Tensor, rows: Sequence[int]) -> None:
    """Raise :class:`UsageError` where the batch has no such pictures."""
    if max(rows) >= len(probs):
        raise UsageError(
            f"the edit is about pictures {' and '.join(map(str, rows))} of a batch of {len(probs)}: paint the one that "
            "is followed and the one that follows it together"
        )


def _in_rows(probs: Tensor, rows: Sequence[int] | None, changed: Tensor) -> Tensor:
    """``changed`` in these rows of the batch, ``probs`` in the others."""
    if rows is None:
        return changed
    result = probs.clone()
    result[list(rows)] = changed[list(rows)]
    return result
