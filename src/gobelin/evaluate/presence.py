"""Presence: scores that should say whether the object that a word names is in an image, in scenes with exact truth.

Attention is asked in two ways: for the greatest share that a noun takes, where it is in the caption, true or false,
and beside a true caption. The error of denoising is asked with each noun in a caption of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from gobelin.attention import Trace
from gobelin.evaluate.intervals import Auc
from gobelin.evaluate.measurement_report import Report, ReportTable, as_json, share_cell
from gobelin.look.heatmaps import HeatMaps
from gobelin.pipeline import Pipeline
from gobelin.scenes import Sample, World, sample
from gobelin.scenes.captions import NOUN_WORDS, NOUNS, Phrasing

PRESENCE_SEED = 81  # of the scenes, apart from training's and those of other measurements
_BATCH_SIZE = 16
_TEXT = "a {}"
IN_CAPTION, BESIDE = "attention, in the caption", "attention, beside the caption"
DENOISING, AMONG = "denoising", "denoising, over the mean of all nouns"


@dataclass(frozen=True, kw_only=True)
class Presence:
    """Separation of nouns by each score: of what is in an image from what is not; and medians of both."""

    model: str
    world: str
    images: int
    told: dict[str, Auc]
    medians: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers."""
        return as_json(self)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A noun's score in an image, and whether what it names is there."""

    image: int
    score: float
    present: bool


def measure_presence(
    pipeline: Pipeline, world: World, count: int, advance: Callable[[], None] = lambda: None, split: str = "test"
) -> Presence:
    """Measure scores of presence in ``count`` true scenes of a split; ``advance`` is called after each."""
    found: dict[str, list[_Asked]] = {name: [] for name in (IN_CAPTION, BESIDE, DENOISING, AMONG)}
    nouns = {shape: NOUNS[shape][0] for shape in world.shapes}
    for start in range(0, count, _BATCH_SIZE):
        samples = [
            sample(PRESENCE_SEED, index, world, split) for index in range(start, min(count, start + _BATCH_SIZE))
        ]
        images = [Image.fromarray(each.image) for each in samples]
        trace = Trace(sharp=True, also=tuple(nouns.values()))
        looked = pipeline.look(images, [each.caption for each in samples], trace=trace)
        gains = pipeline.presence(images, [_TEXT.format(noun) for noun in nouns.values()])
        for number, (each, heatmaps, gain) in enumerate(zip(samples, looked, gains, strict=True), start=start):
            there = {thing.shape for thing in each.scene.objects}
            mean = float(np.mean(list(gain.values())))
            for shape, noun in nouns.items():
                scores = {
                    BESIDE: heatmaps.also[noun].raw.max().item(),
                    DENOISING: gain[_TEXT.format(noun)],
                    AMONG: gain[_TEXT.format(noun)] - mean,
                }
                for name, score in scores.items():
                    found[name].append(_Asked(image=number, score=score, present=shape in there))
            found[IN_CAPTION] += _asked(number, each.phrasing, heatmaps, absent=None)
            advance()
        found[IN_CAPTION] += _false_captions(pipeline, samples, images, start)
    return Presence(
        model=pipeline.name,
        world=world.name,
        images=count,
        told={
            name: Auc.of([one.score for one in asked], [one.present for one in asked], [one.image for one in asked])
            for name, asked in found.items()
        },
        medians={
            name: {
                kind: float(np.median([one.score for one in asked if one.present == present] or [np.nan]))
                for kind, present in (("there", True), ("not there", False))
            }
            for name, asked in found.items()
        },
    )


def _false_captions(
    pipeline: Pipeline, samples: Sequence[Sample], images: Sequence[Image.Image], start: int
) -> Iterator[_Asked]:
    """Look with captions in which one noun is of a shape that is not there."""
    false = [(place, *changed) for place, each in enumerate(samples) for changed in false_captions(each, start + place)]
    if not false:
        return
    captions = [phrasing.text for _, phrasing, _ in false]
    looked = pipeline.look([images[place] for place, *_ in false], captions, trace=Trace(sharp=True))
    for (place, phrasing, mention), heatmaps in zip(false, looked, strict=True):
        yield from _asked(start + place, phrasing, heatmaps, absent=phrasing.mentions[mention].things)


def false_captions(each: Sample, seed: int) -> Iterator[tuple[Phrasing, int]]:
    """Put a shape that is not in the scene into each mention of the caption in turn; yields its number too."""
    rng = np.random.default_rng(seed)
    there = {thing.shape for thing in each.scene.objects}
    free = [shape for shape in each.world.shapes if shape not in there]
    for number, mention in enumerate(each.phrasing.mentions):
        if mention.shape and free:
            mentions = list(each.phrasing.mentions)
            mentions[number] = replace(mention, shape=str(rng.choice(free)), noun=0)
            yield replace(each.phrasing, mentions=tuple(mentions)), number


def _asked(image: int, phrasing: Phrasing, heatmaps: HeatMaps, absent: tuple[int, ...] | None) -> Iterator[_Asked]:
    """Ask for the greatest share of each noun in a caption; those of ``absent`` objects name what is not there."""
    for number, (_, (word, things)) in enumerate(zip(heatmaps.words.spans, phrasing.words(), strict=False)):
        if things and word.strip(",") in NOUN_WORDS:
            score = heatmaps[number].raw.max().item()
            yield _Asked(image=image, score=score, present=things != absent)


def presence_report(content: dict[str, Any]) -> Report:
    """Lay out a :class:`Presence` from JSON."""
    rows = []
    for name, auc in content["told"].items():
        medians = content["medians"][name]
        cells = [f"{medians[kind]:.3f}" if medians[kind] is not None else "–" for kind in ("there", "not there")]
        rows.append((name, share_cell(auc), *cells, f"{auc['n']:,}"))
    return Report(
        title=f"Presence in {content['model']}",
        description=f"World {content['world']}, {content['images']:,} true scenes.",
        tables=[
            ReportTable(
                title="Does a score tell nouns of what is there from others?",
                columns=("score", "AUC", "median, there", "median, not there", "nouns"),
                rows=rows,
                note=(
                    "Area under the ROC curve; 0.5 is chance. Attention is the greatest share in a noun's sharp map, "
                    "of captions that are true, or false in one noun, and of all shapes' nouns beside a true caption. "
                    f"Denoising is Pipeline.presence of “{_TEXT.format('…')}”."
                ),
            )
        ],
    )
