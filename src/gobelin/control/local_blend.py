"""Local blend: outside of some words' pixels an edited image stays the image before."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from gobelin.attention import AttentionEdit, AttentionSite
from gobelin.control.alignment import changed_words, counterparts, tokens_of_words
from gobelin.control.batch import Attached, Batch, RowPair, ShareOfWay, WordList
from gobelin.denoiser import ComposableDenoiser
from gobelin.guidance import ConditionedUNet
from gobelin.samplers import DenoiserOutput
from gobelin.tokenizer import Words
from gobelin.types import Latents
from gobelin.validation import validate_fields


@dataclass(frozen=True, kw_only=True)
class LocalBlend:
    """Local blend (prompt-to-prompt, section 3.2): outside of some words' pixels, image ``rows[1]`` is ``rows[0]``.

    The pixels are those where the map of ``words``, in either prompt, exceeds the share ``threshold`` of its maximum;
    the map is a mean over the steps so far and over coarse sites, widened by a patch. It begins at the share ``start``
    of the way. ``words`` None takes the words that changed, and of a changed adjective the noun that it belongs to.
    Where no word changed, nothing is blended.
    """

    words: WordList | None = None
    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.3
    start: ShareOfWay = 0.2
    rows: RowPair = (0, 1)

    def __post_init__(self) -> None:
        validate_fields(self)

    def attach(self, batch: Batch) -> Attached:
        """Watch the words' attention, and wrap the denoiser."""
        source, target = (batch.words[row] for row in batch.rows(self.rows))
        tokens = blended_tokens(source, target) if self.words is None else tokens_of_words(source, target, self.words)
        if not any(tokens):
            return Attached()
        seen = _Seen(self, batch, tokens)
        edit = AttentionEdit(change=seen.watch, sites=batch.coarse_cross_attention)
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
    "this that these those his her their as like while where there who which riding flying eating lying"
)
_FRAME = frozenset(_FRAME_WORDS.split())


class _Seen:
    """Sum the words' attention over sites and steps."""

    def __init__(self, blend: LocalBlend, batch: Batch, tokens: tuple[list[int], list[int]]):
        self.blend = blend
        self._batch, self._tokens = batch, tokens
        self._sums = torch.zeros(2, *batch.latent_size)

    def watch(self, site: AttentionSite, probs: Tensor) -> Tensor:
        """Add the words' share of a site's attention, and change nothing."""
        for number, (row, tokens) in enumerate(zip(self.blend.rows, self._tokens, strict=True)):
            share = probs[row].mean(dim=0)[:, tokens].sum(dim=-1).reshape(1, 1, *self._batch.grid(site))
            self._sums[number] += F.interpolate(share, size=self._batch.latent_size, mode="bilinear")[0, 0].cpu()
        return probs

    def mask(self) -> Tensor | None:
        """Mark the words' pixels, bool [h, w]; None before anything was seen."""
        if not self._sums.any():
            return None
        wide = F.max_pool2d(self._sums, kernel_size=3, stride=1, padding=1)
        most = wide.amax(dim=(1, 2), keepdim=True).clamp(min=1e-9)
        return (wide / most > self.blend.threshold).any(dim=0)


@dataclass(frozen=True)
class _Blended:
    """A denoiser whose target is the source outside of the words' pixels."""

    denoise: ComposableDenoiser
    network: ConditionedUNet
    seen: _Seen

    def __call__(self, latents: Latents, timestep: float, alpha_cumprod: float) -> DenoiserOutput:
        if self.network.schedule.progress(timestep) >= self.seen.blend.start:
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
