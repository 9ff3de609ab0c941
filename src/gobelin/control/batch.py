"""Controls: how to change what is painted, and what a control sees of the batch that it changes.

A control has one method, ``attach(batch)``, called once before the first step, when the prompts' words, the attention
sites and the size of the latents are known. It returns what it :class:`Attached` to the painting. Words are named as
people write them; each image's own prompt is searched for them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, runtime_checkable

from annotated_types import Len
from torch import Tensor

from gobelin.attention import (
    AnyAttentionEdit,
    AttentionChange,
    AttentionEdit,
    AttentionPatch,
    AttentionSite,
    choose_sites,
)
from gobelin.denoiser import ComposableDenoiser
from gobelin.errors import UsageError
from gobelin.guidance import ConditionedUNet, Guidance
from gobelin.samplers import NoiseLevels, Step
from gobelin.schedule import NoiseSchedule
from gobelin.types import Latents
from gobelin.validation import Fraction, shown, validated
from gobelin.words import Word, Words

COARSE_PATCHES = 16 * 16
"""Sites with as many patches at most settle the layout, at less cost than finer ones (prompt-to-prompt, 3.2)."""

Rows = Annotated[Sequence[int] | None, "numbers of images, as in [1], the first being 0"]
RowPair = Annotated[Sequence[int], Len(2, 2), "the numbers of two images, as in (0, 1)"]
WordList = Annotated[Sequence[Word], "words of the prompt, as in ['circle']"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch of images about to be painted: their words, at the batch's length, and where attention happens."""

    words: tuple[Words, ...]
    latent_size: tuple[int, int]
    channels: int
    sites: tuple[AttentionSite, ...]

    def __len__(self) -> int:
        return len(self.words)

    def rows(self, rows: Sequence[int] | None, *needed: Word) -> list[int]:
        """Choose images: the given ``rows``, or for None all whose prompts have every one of these words.

        Raises :class:`UsageError` for a row that is not there, and for words that no prompt, or a chosen one, lacks.
        """
        rows = validated("rows", rows, Rows)
        if rows is not None and not rows:
            raise UsageError("a control is about no image: name its rows, or leave them out for all")
        if rows is None:
            chosen = [row for row, words in enumerate(self.words) if all(words.has(word) for word in needed)]
            if not chosen:
                for word in needed:
                    if not any(words.has(word) for words in self.words):
                        self.words[0].find(word)  # which says what words there are
                raise UsageError(f"no prompt of the batch has {' and '.join(map(repr, needed))} together")
            return chosen
        for row in rows:
            if not 0 <= row < len(self):
                raise UsageError(f"a control is about image {row} of a batch of {len(self)}: the first is 0")
            for word in needed:
                self.words[row].find(word)
        return list(rows)

    def is_coarse(self, site: AttentionSite) -> bool:
        """Tell whether a site has few enough patches to settle the layout."""
        rows, columns = self.grid(site)
        return rows * columns <= COARSE_PATCHES

    def grid(self, site: AttentionSite) -> tuple[int, int]:
        """Return the rows and columns of a site's patches."""
        return site.grid(*self.latent_size)


@runtime_checkable
class Sampling(Protocol):
    """Another way from noise, or from images, to latents than a sampler's."""

    def levels(self, schedule: NoiseSchedule, steps: int) -> NoiseLevels: ...

    def steps(
        self, denoise: ComposableDenoiser, levels: NoiseLevels, start_noise: Latents, noise: Callable[[], Latents]
    ) -> Iterator[Step]: ...


def _unchanged(denoise: ComposableDenoiser, network: ConditionedUNet) -> ComposableDenoiser:
    return denoise


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A control's attachments to a painting: attention edits, and functions that wrap guidance and denoiser."""

    edits: tuple[AnyAttentionEdit, ...] = ()
    guide: Callable[[Guidance], Guidance] = lambda guidance: guidance
    around: Callable[[ComposableDenoiser, ConditionedUNet], ComposableDenoiser] = _unchanged
    sampling: Sampling | None = None


@runtime_checkable
class Control(Protocol):
    """A change of how images are painted; see :mod:`gobelin.control` for those that there are."""

    def attach(self, batch: Batch) -> Attached: ...


AnyControl = Control | AnyAttentionEdit | AttentionChange
"""A control, an attention edit or patch, or a plain function ``(site, probs) -> probs``."""


@dataclass(frozen=True, kw_only=True)
class WordControl:
    """A control made of others once the batch's words are known.

    ``name`` and ``arguments`` say how it was made.
    """

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict[str, object])
    resolve: Callable[[Batch], Iterable[AnyControl]] = field(repr=False)

    def attach(self, batch: Batch) -> Attached:
        """Resolve the words, and attach what comes of them."""
        return attach_controls(self.resolve(batch), batch)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


def attach_controls(controls: Iterable[AnyControl], batch: Batch) -> Attached:
    """Attach several controls, one after the other: of two that wrap the denoiser the first acts first.

    Raises :class:`UsageError` for words, rows and sites that the batch does not have, and for two ways of sampling.
    """
    attached = [_attached(control, batch) for control in controls]
    sampling = [one.sampling for one in attached if one.sampling is not None]
    if len(sampling) > 1:
        raise UsageError("two controls bring a way of sampling of their own: give one")

    def guide(guidance: Guidance) -> Guidance:
        for one in attached:
            guidance = one.guide(guidance)
        return guidance

    def around(denoise: ComposableDenoiser, network: ConditionedUNet) -> ComposableDenoiser:
        for one in reversed(attached):
            denoise = one.around(denoise, network)
        return denoise

    return Attached(
        edits=tuple(edit for one in attached for edit in one.edits),
        guide=guide,
        around=around,
        sampling=sampling[0] if sampling else None,
    )


def in_rows(probs: Tensor, rows: Sequence[int], changed: Tensor) -> Tensor:
    """Put ``changed`` [rows, …] in the place of these rows of the batch."""
    result = probs.clone()
    result[list(rows)] = changed
    return result


def _attached(control: AnyControl, batch: Batch) -> Attached:
    if isinstance(control, Control) and not isinstance(control, type):
        return control.attach(batch)
    if callable(control) and not isinstance(control, type):
        control = AttentionEdit(change=control)
    if isinstance(control, AttentionPatch):
        _refuse_patch(control, batch)
        return Attached(edits=(control,))
    if not isinstance(control, AttentionEdit):
        raise UsageError(
            f"control is {shown(control)}: give one of gobelin.control, a function (site, probs) -> probs, or several"
        )
    if not callable(control.change):
        raise UsageError(f"the change of an attention edit is {shown(control.change)}: give a function (site, probs)")
    _chosen_sites(control, batch, "an attention edit")
    return Attached(edits=(control,))


def _chosen_sites(edit: AnyAttentionEdit, batch: Batch, what: str) -> tuple[AttentionSite, ...]:
    """Choose an edit's sites, once its part of the way is known to be one."""
    for name, share in (("start", edit.start), ("end", edit.end)):
        validated(f"the {name} of {what}", share, Fraction)
    return choose_sites(batch.sites, edit.sites)


def _refuse_patch(patch: AttentionPatch, batch: Batch) -> None:
    """Raise :class:`UsageError` for a patch of images, sites or heads that this batch or U-Net does not have."""
    sites = _chosen_sites(patch, batch, "an attention patch")
    batch.rows(validated("source and target of an attention patch", (patch.source, patch.target), RowPair))
    validated("the part of an attention patch", patch.part, Literal["text", "output"])
    if patch.part == "text" and (others := [site.name for site in sites if site.kind != "cross"]):
        raise UsageError(f"{others[0]} attends to no text: patch its output, or choose sites of cross-attention")
    for head in validated("the heads of an attention patch", patch.heads, Rows) or ():
        if few := [site for site in sites if not 0 <= head < site.heads]:
            raise UsageError(f"{few[0].name} has no head {head}: its {few[0].heads} heads count from 0")
