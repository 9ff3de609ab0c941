"""Local blend: outside of some words' pixels an edited image stays the image before."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gobelin.attention import AttentionEdit, AttentionSite
from gobelin.control.alignment import changed_words, counterparts, tokens_of_words
from gobelin.control.batch import Attached, Batch, RowPair, WordList
from gobelin.denoiser import ComposableDenoiser
from gobelin.guidance import ConditionedUNet
from gobelin.look.sharp_maps import sharp_trace, sharpen
from gobelin.samplers import DenoiserOutput
from gobelin.types import Latents
from gobelin.validation import Fraction, validate_fields
from gobelin.words import Words


@dataclass(frozen=True, kw_only=True)
class LocalBlend:
    """Local blend (prompt-to-prompt, section 3.2): outside of some words' pixels, image ``rows[1]`` is ``rows[0]``.

    The pixels are those where the sharp map of ``words``, in either image, exceeds the share ``threshold`` of its
    maximum, widened by a patch (:meth:`gobelin.look.heatmaps.HeatMaps.sharpened`). The map is of the steps from the
    share ``start`` of the way on, when blending begins. ``words`` None takes the words that changed, and of a changed
    adjective the noun that it belongs to. Where no word changed, nothing is blended.
    """

    words: WordList | None = None
    threshold: Fraction = 0.15
    start: Fraction = 0.5
    rows: RowPair = (0, 1)

    def __post_init__(self) -> None:
        validate_fields(self)

    def attach(self, batch: Batch) -> Attached:
        """Watch the words' attention, and wrap the denoiser."""
        source, target = (batch.words[row] for row in batch.rows(self.rows))
        tokens = blended_tokens(source, target) if self.words is None else tokens_of_words(source, target, self.words)
        if not any(tokens):
            return Attached()
        seen = _Seen(self, batch.latent_size, tokens)
        edit = AttentionEdit(change=seen.watch, sites=sharp_trace(batch.sites, batch.latent_size).sites, observes=True)
        return Attached(edits=(edit,), around=lambda denoise, network: _Blended(denoise, network, seen))


def blended_tokens(source: Words, target: Words) -> tuple[list[int], list[int]]:
    """Find the tokens by whose attention an edit is bounded, as (in source, in target).

    They are the heads of the changed words' phrases: of "a red circle left of" where "red" changed, "circle". An
    adjective is attended to from everywhere, its noun is not (docs/decisions.md, "An edit is bounded by the noun").
    """
    heads = [
        {phrase_head(words, words.spans.index(span)) for span in changed}
        for words, changed in zip((source, target), changed_words(source, target), strict=True)
    ]
    for one, other in counterparts(source, target):
        pair = source.spans.index(one), target.spans.index(other)
        if pair[0] in heads[0] or pair[1] in heads[1]:
            heads[0].add(pair[0])
            heads[1].add(pair[1])
    old, new = (
        [token for number in sorted(chosen) for token in words.spans[number].tokens]
        for words, chosen in zip((source, target), heads, strict=True)
    )
    return old, new


def phrase_head(words: Words, number: int) -> int:
    """Find the last word of the phrase that a word stands in: its noun, in English.

    A phrase ends before punctuation, and before a word of the sentence's frame: an article, a preposition, a verb form.
    """
    while number + 1 < len(words.spans):
        span, after = words.spans[number : number + 2]
        if words.text[span.end : after.start].strip() or _ends_phrase(after.word.lower()):
            break
        number += 1
    return number


def _ends_phrase(word: str) -> bool:
    return word in _FRAME or (word.endswith("ing") and len(word) >= _SHORTEST_PARTICIPLE)


_SHORTEST_PARTICIPLE = 7  # letters: "wearing", "sitting", and not "ring" or "string"
_FRAME_WORDS = (
    "a an the and or with without in on at of to by from for into onto over under above below left right next near "
    "behind between beside before after inside outside around through is are was were be has have had does do it its "
    "this that these those his her their as like while where there who which riding flying eating lying "
    "higher lower larger smaller bigger taller more less than alone only together also too"
)
_FRAME = frozenset(_FRAME_WORDS.split())


class _Seen:
    """Sum the attention of both images over steps and sites: of the words' patches, and of patches to each other."""

    def __init__(self, blend: LocalBlend, latent_size: tuple[int, int], tokens: tuple[list[int], list[int]]):
        self.blend = blend
        self._latent_size, self._tokens = latent_size, tokens
        self._grid = latent_size
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._is_late = False

    def watch(self, site: AttentionSite, probs: Tensor) -> Tensor:
        """Add a site's attention, and change nothing."""
        for number, (row, tokens) in enumerate(zip(self.blend.rows, self._tokens, strict=True)):
            mean = probs[row].mean(dim=0).float().cpu()
            seen = mean[:, tokens].sum(dim=-1) if site.kind == "cross" else mean
            self._sums[site.kind, number] = self._sums.get((site.kind, number), 0) + seen
        self._grid = site.grid(*self._latent_size)
        return probs

    def begin(self) -> None:
        """Forget, once, what was seen of noisy images: it points badly."""
        if not self._is_late:
            self._sums.clear()
            self._is_late = True

    def mask(self) -> Tensor | None:
        """Mark the words' pixels, bool [h, w]; None before anything was seen."""
        if not self._sums:
            return None
        marked = torch.zeros(self._latent_size, dtype=torch.bool)
        for number in range(len(self._tokens)):
            share = sharpen(self._sums["cross", number], self._sums["self", number]).reshape(1, 1, *self._grid)
            wide = F.max_pool2d(share, kernel_size=3, stride=1, padding=1)
            large = F.interpolate(wide, size=self._latent_size, mode="bilinear")[0, 0]
            marked |= large > self.blend.threshold * large.max()
        return marked


@dataclass(frozen=True)
class _Blended:
    """A denoiser whose target is the source outside of the words' pixels."""

    denoise: ComposableDenoiser
    network: ConditionedUNet
    seen: _Seen

    def __call__(self, latents: Latents, timestep: float, alpha_cumprod: float) -> DenoiserOutput:
        if self.network.schedule.progress(timestep) >= self.seen.blend.start:
            self.seen.begin()
            latents = self._blended(latents)
        return self.denoise(latents, timestep, alpha_cumprod)

    def finish(self, latents: Latents) -> Latents:
        return self.denoise.finish(self._blended(latents))

    def _blended(self, latents: Latents) -> Latents:
        mask = self.seen.mask()
        if mask is None:
            return latents
        source, target = self.seen.blend.rows
        result = latents.clone()
        result[target] = torch.where(mask.to(latents.device), latents[target], latents[source])
        return result
