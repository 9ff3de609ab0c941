"""Painting by other attention: what changes when words are looked at more, less, elsewhere, or as in another picture.

What these functions make composes by standing in one list. Words are looked up in a prompt's
:class:`gobelin.tokenizer.Words`. Edits concern the pictures ``rows`` of a batch, None being all; where places matter,
``latent_size`` (h, w) is that of :meth:`gobelin.pipeline.Pipeline.latent_size`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gobelin.attention import AttentionMaps, AttentionSite, Edit, Sites
from gobelin.errors import UsageError
from gobelin.tokenizer import Word, Words, WordSpan

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
        grid = _grid(site, latent_size, probs)
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
        _require_rows(probs, rows)
        changed = probs.clone()
        taken = probs[first] @ mapping.to(probs)
        changed[second] = torch.where(new.to(probs.device), probs[second], taken)
        return changed

    def patches_followed(site: AttentionSite, probs: Tensor) -> Tensor:
        _require_rows(probs, rows)
        changed = probs.clone()
        changed[second] = probs[first]
        return changed

    return [
        Edit(change=words_followed, end=cross),
        Edit(
            change=patches_followed, sites=lambda site: site.kind == "self" and _is_coarse(site, latent_size), end=own
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Something that attention maps should be like: latents are moved to lessen ``loss(maps)`` [B] before each step.

    They move by ``strength`` · loss in the direction of steepest descent, root mean square over a picture's latents,
    until the share ``end`` of the way. Of a batch only the pictures ``rows`` wish for it, None being all. The maps are
    those that edits of attention leave, or where ``edited`` is False those that would be without them.
    """

    loss: Callable[[AttentionMaps], Tensor]
    sites: Sites = None
    strength: float = 0.3
    end: float = 0.5
    rows: Sequence[int] | None = None
    edited: bool = True


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
        grid = _grid(next(iter(finest)), latent_size, probs)
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
                inside = F.interpolate(mask[None, None], size=_grid(site, latent_size, probs), mode="area").flatten()
                outside.append(1 - (_spread(probs, tokens) * inside.to(probs)).sum(dim=-1))
        return torch.stack(outside).mean(dim=0)

    return Wish(loss=loss, sites=_coarse_words(latent_size), strength=strength, end=end, rows=rows)


def held(
    source: Words,
    target: Words,
    latent_size: tuple[int, int],
    strength: float = 3.0,
    end: float = 0.5,
    rows: tuple[int, int] = (0, 1),
) -> Wish | None:
    """What changed words speak of is to be where it was (after self-guidance: Epstein et al. 2023, arXiv 2306.00986).

    Prompt-to-prompt makes the picture ``rows[1]`` *look* at its words as ``rows[0]`` does; what the changed words make
    of it may yet settle elsewhere. The loss is how differently, without edits, the two pictures look at each changed
    word and at the word after it: half the sum of the differences over patches, as shares of the word's attention, a
    mean over words and over the finest sites with at most 16×16 patches. None where no changed word stands for one
    before.
    """
    first, second = rows
    counterparts = {id(now): before for before, now in _counterparts(source, target)}
    pairs = []
    after_change = False
    for span in target.spans:
        before = counterparts.get(id(span))
        changed = before is None or before.word.lower() != span.word.lower()
        if before is not None and (changed or after_change):
            pairs.append((list(before.tokens), list(span.tokens)))
        after_change = changed
    if not pairs:
        return None

    def loss(maps: AttentionMaps) -> Tensor:
        apart = []
        for probs in _finest(maps).values():
            _require_rows(probs, rows)
            for before, now in pairs:
                difference = _spread(probs[first], before).detach() - _spread(probs[second], now)
                apart.append(difference.abs().sum() / 2)
        losses = torch.zeros(len(next(iter(maps.values()))), device=apart[0].device)
        losses[second] = torch.stack(apart).mean()
        return losses

    return Wish(loss=loss, sites=_coarse_words(latent_size), strength=strength, end=end, rows=[second], edited=False)


def _finest(maps: AttentionMaps) -> AttentionMaps:
    """The maps of the sites with the smallest patches."""
    finest = min(site.downscale for site in maps)
    return {site: probs for site, probs in maps.items() if site.downscale == finest}


def _spread(probs: Tensor, tokens: Sequence[int]) -> Tensor:
    """How some tokens' attention [..., patches] is spread over the patches: shares that sum to 1."""
    share = probs[..., list(tokens)].sum(dim=-1)
    return share / share.sum(dim=-1, keepdim=True).clamp(min=1e-9)


def _coarse_words(latent_size: tuple[int, int]) -> Callable[[AttentionSite], bool]:
    return lambda site: site.kind == "cross" and _is_coarse(site, latent_size)


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
        return site.kind == "cross" and _is_coarse(site, self._blend.latent_size)

    def _watched(self, site: AttentionSite, probs: Tensor) -> Tensor:
        _require_rows(probs, self._blend.rows)
        grid = _grid(site, self._blend.latent_size, probs)
        for number, (row, tokens) in enumerate(zip(self._blend.rows, self._blend.tokens, strict=True)):
            share = probs[row].mean(dim=0)[:, list(tokens)].sum(dim=-1).reshape(1, 1, *grid)
            self._seen[number] += F.interpolate(share, size=self._blend.latent_size, mode="bilinear")[0, 0].cpu()
        return probs


def alignment(source: Words, target: Words) -> Float[Tensor, "length length"]:
    """What each token of ``target`` takes over from the tokens of ``source``; nothing, where its word is new.

    Equal words in order are each other's; as many changed words in a row as there were are each other's in turn,
    and share out evenly what they get where they have more or fewer tokens; punctuation goes with the word before it.
    BOS, EOS and padding are each other's.
    """
    mapping = torch.zeros(source.length, target.length)
    mapping[0, 0] = 1
    after = min(source.length - source.end, target.length - target.end)
    for offset in range(after):
        mapping[source.end + offset, target.end + offset] = 1
    for position in range(target.end + after, target.length):
        mapping[source.length - 1, position] = 1
    for before, now in _counterparts(source, target):
        if len(before.tokens) == len(now.tokens):
            mapping[before.tokens, now.tokens] = 1
        else:
            for token in now.tokens:
                mapping[before.tokens, token] = 1 / len(now.tokens)
        for one, other in zip(_marks_after(source, before), _marks_after(target, now), strict=False):
            mapping[one, other] = 1
    return mapping


def _counterparts(source: Words, target: Words) -> Iterator[tuple[WordSpan, WordSpan]]:
    """The words of two prompts that stand for each other: equal ones in order, and as many changed ones in a row."""
    spoken = [[span.word.lower() for span in words.spans] for words in (source, target)]
    for kind, i, j, k, n in SequenceMatcher(None, *spoken, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and j - i == n - k):
            yield from zip(source.spans[i:j], target.spans[k:n], strict=True)


def _marks_after(words: Words, span: WordSpan) -> list[int]:
    """The tokens between a word and the next: punctuation."""
    later = [token for other in words.spans for token in other.tokens if token > span.tokens[-1]]
    return list(range(span.tokens[-1] + 1, min(later, default=words.end)))


def _is_coarse(site: AttentionSite, latent_size: tuple[int, int]) -> bool:
    return math.prod(site.grid(*latent_size)) <= COARSE_PATCHES


def _grid(site: AttentionSite, latent_size: tuple[int, int], probs: Tensor) -> tuple[int, int]:
    """The rows and columns of a site's patches; :class:`UsageError` where its probabilities have other ones."""
    grid = site.grid(*latent_size)
    if math.prod(grid) != probs.shape[-2]:
        raise UsageError(
            f"the edit is for latents of {latent_size[0]}×{latent_size[1]}, but {site.name} has {probs.shape[-2]} "
            "patches: give the latent_size of the picture that is painted"
        )
    return grid


def _require_rows(probs: Tensor, rows: Sequence[int]) -> None:
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
