"""Activation patching: which cross-attention carries colour, shape, number and place, with a known truth.

Two captions differ in one word, and both are painted from one noise. Then the first is painted again, but at some sites
it gets the other caption's text (keys and values), or what the other image's heads return there. The grader says
whether the image now shows what the other caption asks for. Sites are patched one by one, and all but one; at all of
them for a third of the way; and from the caption of another pair, which says how often it happens by chance.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from gobelin.attention import AttentionPatch, AttentionSite, choose_sites
from gobelin.errors import UsageError
from gobelin.evaluate.attribution import found_masks
from gobelin.evaluate.intervals import Share
from gobelin.evaluate.measurement_report import Report, ReportTable, as_json, share_cell
from gobelin.evaluate.word_changes import WORD_KINDS, WordChange, WordKind, change_word
from gobelin.pipeline import Pipeline
from gobelin.scenes import World, grade, sample

PATCHING_SEED = 79  # of the scenes, apart from training's, attribution's and editing's
TRIES_PER_PAIR = 16  # captions tried for each pair that is wanted
_BATCH_SIZE = 16
_THIRDS = {"first third": (0.0, 1 / 3), "second third": (1 / 3, 2 / 3), "last third": (2 / 3, 1.0)}


@dataclass(frozen=True, kw_only=True)
class PatchOutcome:
    """The outcomes of one way to patch: the share of images that are right for the caption that was patched in
    (``follows``), and that are right for neither (``breaks``).
    """

    follows: Share
    breaks: Share


@dataclass(frozen=True, kw_only=True)
class PatchedKind:
    """Patches between captions that differ in one kind of word, by what was patched."""

    pairs: int
    patches: dict[str, PatchOutcome]


@dataclass(frozen=True, kw_only=True)
class Patching:
    """Patches between pairs of one model's images, by the kind of word that differs."""

    model: str
    world: str
    kinds: dict[WordKind, PatchedKind]

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers."""
        return as_json(self)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """A change of a word, and a seed from which both captions' images are right."""

    change: WordChange
    seed: int


def measure_patching(
    pipeline: Pipeline,
    world: World,
    count: int,
    kinds: Sequence[WordKind] = WORD_KINDS,
    advance: Callable[[], None] = lambda: None,
) -> Patching:
    """Patch between the first ``count`` pairs of captions whose images are both right, or as many as there are.

    ``advance`` is called after each pair. Kinds with fewer than two pairs are left out; raises :class:`UsageError`
    where that leaves none.
    """
    sites = choose_sites(pipeline.unet.attention_sites)
    measured = {}
    for kind in kinds:
        pairs = list(islice(_right_pairs(pipeline, world, kind, TRIES_PER_PAIR * count), count))
        if len(pairs) < 2:
            continue
        outcomes: dict[str, list[tuple[bool, bool]]] = {}
        for pair, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True):
            for name, outcome in _patch(pipeline, world, sites, pair, other).items():
                outcomes.setdefault(name, []).append(outcome)
            advance()
        measured[kind] = PatchedKind(
            pairs=len(pairs),
            patches={
                name: PatchOutcome(
                    follows=Share.of([follows for follows, _ in found]),
                    breaks=Share.of([not (follows or stays) for follows, stays in found]),
                )
                for name, found in outcomes.items()
            },
        )
    if not measured:
        raise UsageError(
            f"of {TRIES_PER_PAIR * count:,} captions there are not two that this model paints right both before and "
            "after a word is changed: there is nothing to patch"
        )
    return Patching(model=pipeline.name, world=world.name, kinds=measured)


def patching_report(content: dict[str, Any]) -> Report:
    """Lay out a :class:`Patching` from JSON."""
    kinds = content["kinds"]
    names = list(next(iter(kinds.values()))["patches"])

    def table(outcome: str, title: str, note: str) -> ReportTable:
        return ReportTable(
            title=title,
            columns=("patched", *(f"{kind} ({measured['pairs']} pairs)" for kind, measured in kinds.items())),
            rows=[
                (name, *(share_cell(measured["patches"][name][outcome]) for measured in kinds.values()))
                for name in names
            ],
            note=note,
        )

    return Report(
        title=f"Activation patching in {content['model']}",
        description=f"World {content['world']}; pairs of captions that differ in one word, each right from one noise.",
        tables=[
            table(
                "follows",
                "Shows what the other caption asks for",
                "Text: keys and values of the other caption's words, at this site alone, or everywhere else. Output: "
                "what the other image's heads return. Thirds of the way from noise to image, at all sites. Another "
                "pair's caption: how often it happens by chance. With nothing patched it is 0: so pairs are chosen.",
            ),
            table(
                "breaks",
                "Shows what neither caption asks for",
                "Of the same images: right for neither of the two captions.",
            ),
        ],
    )


def _right_pairs(pipeline: Pipeline, world: World, kind: WordKind, tries: int) -> Iterator[_Pair]:
    """Generate both images of each change in batches; yield those where each is right for its caption alone."""
    drawn = (
        (PATCHING_SEED + index, change)
        for index in range(tries)
        if (change := change_word(sample(PATCHING_SEED, index, world, "test"), world, kind, index)) is not None
    )
    while some := list(islice(drawn, _BATCH_SIZE)):
        captions = [one.before.text for _, one in some] + [one.after.text for _, one in some]
        images = pipeline(captions, seed=[seed for seed, _ in some] * 2).images
        found = [grade(image, world) for image in images]
        for (seed, change), before, after in zip(some, found[: len(some)], found[len(some) :], strict=True):
            if found_masks(change.before, before) is not None and found_masks(change.after, after) is not None:
                yield _Pair(change=change, seed=seed)


def _patch(
    pipeline: Pipeline, world: World, sites: Sequence[AttentionSite], pair: _Pair, other: _Pair
) -> dict[str, tuple[bool, bool]]:
    """Paint one caption with every patch from the other, in one batch: whether each image follows, and stays."""
    first = 2  # of the images that are patched, after those that patches come from
    patches: dict[str, partial[AttentionPatch]] = {}
    for site in sites:
        patches[f"text at {_short(site)}"] = partial(AttentionPatch, source=0, sites=[site])
    for site in sites:
        rest = [each for each in sites if each is not site]
        if rest:
            patches[f"text but at {_short(site)}"] = partial(AttentionPatch, source=0, sites=rest)
    for site in sites:
        patches[f"output of {_short(site)}"] = partial(AttentionPatch, source=0, sites=[site], part="output")
    for name, (start, end) in _THIRDS.items():
        patches[f"text, {name}"] = partial(AttentionPatch, source=0, sites=sites, start=start, end=end)
    patches["text everywhere"] = partial(AttentionPatch, source=0, sites=sites)
    patches["another pair's text everywhere"] = partial(AttentionPatch, source=1, sites=sites)
    before, after = pair.change.before, pair.change.after
    images = pipeline(
        [after.text, other.change.after.text, *[before.text] * len(patches)],
        seed=[pair.seed] * (first + len(patches)),
        control=[patch(target=first + place) for place, patch in enumerate(patches.values())],
    ).images[first:]
    outcomes = {}
    for name, image in zip(patches, images, strict=True):
        found = grade(image, world)
        outcomes[name] = found_masks(after, found) is not None, found_masks(before, found) is not None
    return outcomes


def _short(site: AttentionSite) -> str:
    """Name a site of cross-attention by its place in the U."""
    return site.name.partition(".transformer_blocks")[0].replace("_blocks.", " ").replace(".attentions.", ".")
