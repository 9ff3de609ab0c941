"""Ablations: runs that are broken on purpose, to see what the words, BOS, or one site of cross-attention are for."""

from collections.abc import Iterator
from typing import Annotated, Literal

from torch import Tensor

from gobelin.attention import AttentionEdit, AttentionSite
from gobelin.control.batch import Batch, WordControl
from gobelin.errors import UsageError
from gobelin.validation import validated

Ablation = Literal["shuffle_words", "silence_site", "remove_bos"]
_TINY = 1e-9


def ablate(ablation: Ablation, site: str | None = None) -> WordControl | AttentionEdit:
    """Make the ablation of that name: :func:`shuffle_words`, :func:`remove_bos`, or :func:`silence_site` of a ``site``.

    Raises :class:`UsageError` for another name, and for a site where none belongs or none where one does.
    """
    validated("the ablation", ablation, Ablation)
    if (ablation == "silence_site") != (site is not None):
        raise UsageError("a site is for silence_site, and that needs one: give the name of an attention site")
    if site is not None:
        return silence_site(site)
    return shuffle_words() if ablation == "shuffle_words" else remove_bos()


def shuffle_words() -> WordControl:
    """Shuffle words: what a patch attends to in one token of the text it hears from the next one, the last's from the
    first."""

    def resolve(batch: Batch) -> Iterator[AttentionEdit]:
        texts = [list(words.part("text")) for words in batch.words]

        def change(site: AttentionSite, probs: Tensor) -> Tensor:
            changed = probs.clone()
            for row, tokens in enumerate(texts):
                changed[row, ..., tokens] = probs[row, ..., tokens[-1:] + tokens[:-1]]
            return changed

        yield AttentionEdit(change=change, sites=_is_cross)

    return WordControl(name="shuffle_words", resolve=resolve)


def silence_site(site: str) -> AttentionEdit:
    """Silence a site (a pattern of names): its patches hear nothing from it."""
    validated("the site", site, Annotated[str, "the name of an attention site"])
    return AttentionEdit(change=lambda site, probs: probs * 0, sites=site)


def remove_bos() -> WordControl:
    """Remove BOS, which most attention goes to where no word has a say: the other tokens share what it had."""

    def resolve(batch: Batch) -> Iterator[AttentionEdit]:
        starts = [list(words.part("bos")) for words in batch.words]

        def change(site: AttentionSite, probs: Tensor) -> Tensor:
            kept = probs.clone()
            for row, tokens in enumerate(starts):
                kept[row, ..., tokens] = 0
            return kept / kept.sum(dim=-1, keepdim=True).clamp(min=_TINY)

        yield AttentionEdit(change=change, sites=_is_cross)

    return WordControl(name="remove_bos", resolve=resolve)


def _is_cross(site: AttentionSite) -> bool:
    return site.kind == "cross"
