"""Attribution: compare the heat maps of words with the masks of the objects that they speak of.

Two kinds of images: the model's own, where the grader finds exactly what the caption asks for, with the grader's
masks; and true renders, noised to several timesteps, with exact masks. By DAAM's protocol (Tang et al. 2022, arXiv
2210.04885, section 4.1) a word's map, above a threshold τ of its range, is intersected with the mask.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gobelin.attention import AttentionSite, Trace
from gobelin.control import suppress
from gobelin.evaluate.intervals import Mean
from gobelin.evaluate.measurement_report import Report, ReportTable, as_json, mean_cell
from gobelin.look.heatmaps import HeatMap, HeatMaps
from gobelin.pipeline import Pipeline
from gobelin.scenes import Detection, Sample, World, grade, sample
from gobelin.scenes.captions import NOUN_WORDS, NUMBERS, Phrasing
from gobelin.scenes.colours import COLOURS
from gobelin.scenes.relations import answers, found_in

ATTRIBUTION_SEED = 77  # of the scenes, apart from training's
_TIMESTEPS = (100, 300, 500, 700, 900)
_THRESHOLDS = (0.3, 0.4, 0.5)
_BATCH_SIZE = 16
_EXACT = "the objects' mask"
_CAUSALITY_IMAGES = 25  # each is generated again for every word


@dataclass(frozen=True, kw_only=True)
class WordTruth:
    """A word's number in the caption, its kind, and the mask of the objects that it speaks of, bool [H, W]."""

    number: int
    kind: str
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class AttributionCase:
    """One image with its heat maps, complete with heads apart and sharp ones, and the truth about its words.

    ``looked`` are those of the finished image (:meth:`gobelin.pipeline.Pipeline.look`); of a true render all are.
    ``settings`` generate an image of the model's own again.
    """

    heatmaps: HeatMaps
    sharp: HeatMaps
    looked: HeatMaps
    truths: tuple[WordTruth, ...]
    settings: dict | None = None


MapProtocol = Callable[[AttributionCase, int], HeatMap]
"""(a case, number of the word) -> the word's map."""


@dataclass(frozen=True, kw_only=True)
class KindOverlap:
    """Mean intersection over union of one kind of word's maps with their masks, at a threshold τ."""

    kind: str
    threshold: float
    overlap: Mean


@dataclass(frozen=True, kw_only=True)
class ProtocolOverlap:
    """Overlaps of the maps of one protocol: by kind of word, and for nouns with each pixel given to one of them."""

    kinds: list[KindOverlap]
    argmax: Mean


@dataclass(frozen=True, kw_only=True)
class ImagesAttribution:
    """Attribution in one kind of images.

    ``ceilings`` are the overlaps of perfect maps by their downscale, and ``whole_image`` that of a map that lights up
    everywhere, both for nouns. ``shares`` of attention go to text, BOS, EOS and padding, and ``entropy`` is that of
    the attention in nats; empty and None without images.
    """

    images: int
    protocols: dict[str, ProtocolOverlap]
    ceilings: dict[str, Mean]
    whole_image: Mean
    shares: dict[str, float]
    entropy: float | None


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Attribution in a model's own images and in true renders, and the causality of words by protocol and kind."""

    model: str
    world: str
    captions: int
    own: ImagesAttribution
    renders: ImagesAttribution
    causality: dict[str, dict[str, Mean]]

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers."""
        return as_json(self)


def measure_attribution(
    pipeline: Pipeline, world: World, count: int, advance: Callable[[], None] = lambda: None
) -> Attribution:
    """Measure attribution on ``count`` captions of the test list.

    Where the grader finds no image right, means are NaN. ``advance`` is called after each image.
    """

    def counted(cases: Iterator[AttributionCase]) -> list[AttributionCase]:
        return [case for case in cases if advance() is None]

    own, true = counted(own_samples(pipeline, world, count)), counted(renders(pipeline, world, count))
    return Attribution(
        model=pipeline.name,
        world=world.name,
        captions=count,
        own=_images_attribution(pipeline, own),
        renders=_images_attribution(pipeline, true),
        causality=causality(pipeline, own[:_CAUSALITY_IMAGES]),
    )


def _images_attribution(pipeline: Pipeline, cases: Sequence[AttributionCase]) -> ImagesAttribution:
    """Measure attribution in images of one kind, apart from causality."""
    sites = {site.downscale: site for site in pipeline.unet.attention_sites}
    return ImagesAttribution(
        images=len(cases),
        protocols={
            name: ProtocolOverlap(
                kinds=[
                    KindOverlap(kind=kind, threshold=threshold, overlap=mean)
                    for (kind, threshold), mean in sorted(intersections(cases, protocol).items())
                ],
                argmax=argmax_intersection(cases, protocol),
            )
            for name, protocol in PROTOCOLS.items()
        },
        ceilings={str(downscale): ceiling(cases, site) for downscale, site in sorted(sites.items())},
        whole_image=whole_image(cases),
        shares=_average([case.heatmaps.shares() for case in cases]),
        entropy=float(np.mean([case.heatmaps.entropy() for case in cases])) if cases else None,
    )


def own_samples(pipeline: Pipeline, world: World, count: int) -> Iterator[AttributionCase]:
    """Generate images of ``count`` captions; yield those in which the grader finds what they ask for, nothing else."""
    for indices in _batches(count):
        samples = [sample(ATTRIBUTION_SEED, index, world, "test") for index in indices]
        result = pipeline(
            [each.caption for each in samples], seed=ATTRIBUTION_SEED + indices[0], trace=Trace(per_head=True)
        )
        right = [
            (each, heatmaps, masks, settings)
            for each, heatmaps, settings in zip(samples, result.heatmaps, result.settings, strict=True)
            if (masks := found_masks(each.phrasing, grade(heatmaps.image, world))) is not None
        ]
        if not right:
            continue
        captions, seeds = [each.caption for each, *_ in right], [settings["seed"] for *_, settings in right]
        sharp = pipeline(captions, seed=seeds, trace="sharp").heatmaps  # the same images, whatever is traced
        looked = pipeline.look([heatmaps.image for _, heatmaps, *_ in right], captions)
        for (each, heatmaps, masks, settings), pointing, seen in zip(right, sharp, looked, strict=True):
            found = word_truths(each, heatmaps, masks)
            yield AttributionCase(heatmaps=heatmaps, sharp=pointing, looked=seen, truths=found, settings=settings)


def renders(pipeline: Pipeline, world: World, count: int) -> Iterator[AttributionCase]:
    """Render ``count`` true scenes and look at them."""
    for indices in _batches(count):
        samples = [sample(ATTRIBUTION_SEED, index, world, "test") for index in indices]
        captions, images = [each.caption for each in samples], [Image.fromarray(each.image) for each in samples]
        plain = pipeline.look(images, captions, timesteps=_TIMESTEPS, trace=Trace(per_head=True))
        for each, heatmaps, sharp in zip(samples, plain, pipeline.look(images, captions), strict=True):
            found = word_truths(each, heatmaps, torch.from_numpy(each.masks))
            yield AttributionCase(heatmaps=heatmaps, sharp=sharp, looked=sharp, truths=found)


def found_masks(phrasing: Phrasing, detections: Sequence[Detection]) -> Tensor | None:
    """Find the masks [n, H, W] of a caption's objects; None where they are not all there, or others are.

    None too where two objects answer to the description of one, as it would be unclear which of them a word means.
    """
    things = [thing for mention in phrasing.mentions for thing in mention.things]
    if len(detections) != len(things) or not found_in(
        phrasing.wanted, phrasing.relation, detections, count=phrasing.count
    ):
        return None
    masks = torch.zeros(len(things), *detections[0].mask.shape, dtype=torch.bool)
    for mention in phrasing.mentions:
        answering = [thing for thing in detections if answers(mention.wanted, thing)]
        if len(answering) != len(mention.things):
            return None
        for place, thing in zip(mention.things, answering, strict=True):
            masks[place] = torch.from_numpy(thing.mask)
    return masks


def word_truths(each: Sample, heatmaps: HeatMaps, masks: Tensor) -> tuple[WordTruth, ...]:
    """List the truths of the caption's words that speak of objects and were not cut off."""
    spoken = [(word.strip(","), things) for word, things in each.words]
    found = []
    for number, (span, (word, things)) in enumerate(zip(heatmaps.words.spans, spoken, strict=False)):
        assert span.word == word, "the tokenizer's words are not the caption's"
        if things:
            found.append(
                WordTruth(number=number, kind=word_kind(word, len(things)), mask=masks[list(things)].any(dim=0))
            )
    return tuple(found)


def word_kind(word: str, things: int) -> str:
    """Name the kind of a word that speaks of ``things`` objects."""
    if word in NOUN_WORDS:
        return "noun"
    if word in COLOURS:
        return "colour"
    if word.isdigit() or word in NUMBERS.values():
        return "number"
    return "relation" if things > 1 else "place"


def daam(case: AttributionCase, number: int) -> HeatMap:
    """Aggregate a word's map as DAAM does: every step, layer and head."""
    return case.heatmaps.daam(number)


def sharpened(case: AttributionCase, number: int) -> HeatMap:
    """Take a word's sharp map: :meth:`gobelin.look.heatmaps.HeatMaps.sharpened`."""
    return case.sharp[number]


def unweighted(case: AttributionCase, number: int) -> HeatMap:
    """Take a word's sharp map as it is without head weights."""
    return case.sharp.unweighted()[number]


def looked_at(case: AttributionCase, number: int) -> HeatMap:
    """Take a word's sharp map of the finished image."""
    return case.looked[number]


PROTOCOLS: dict[str, MapProtocol] = {
    "DAAM": daam,
    "sharp, unweighted": unweighted,
    "sharp": sharpened,
    "looked at": looked_at,
}


def intersections(cases: Sequence[AttributionCase], protocol: MapProtocol) -> dict[tuple[str, float], Mean]:
    """Compute the mean intersection over union by kind of word and threshold."""
    values: dict[tuple[str, float], list[list[float]]] = {}
    for case in cases:
        for groups in values.values():
            groups.append([])
        for truth in case.truths:
            heatmap = protocol(case, truth.number)
            for threshold in _THRESHOLDS:
                groups = values.setdefault((truth.kind, threshold), [[]])
                groups[-1].append(overlap(heatmap.mask(threshold), truth.mask))
    return {key: Mean.of(groups) for key, groups in values.items()}


def argmax_intersection(cases: Sequence[AttributionCase], protocol: MapProtocol, threshold: float = 0.4) -> Mean:
    """Compute nouns' mean overlap where every pixel goes to one of them, or below the threshold to none.

    Captions without nouns for different objects are left out.
    """
    groups = []
    for case in cases:
        nouns = [truth for truth in case.truths if truth.kind == "noun"]
        if len({truth.mask.numpy().tobytes() for truth in nouns}) < 2:
            continue
        values = torch.stack([protocol(case, truth.number).values for truth in nouns])
        most, winner = values.max(dim=0)
        groups.append(
            [overlap((winner == place) & (most > threshold), truth.mask) for place, truth in enumerate(nouns)]
        )
    return Mean.of(groups)


def ceiling(cases: Sequence[AttributionCase], site: AttentionSite, threshold: float = 0.4) -> Mean:
    """Compute the overlap of perfect maps of a site's resolution for nouns: their masks, averaged over its patches."""
    groups = []
    for case in cases:
        group = []
        for truth in case.truths:
            if truth.kind == "noun":
                grid = site.grid(*case.heatmaps.latent_size)
                small = F.interpolate(truth.mask[None, None].float(), size=grid, mode="area")
                large = F.interpolate(small, size=truth.mask.shape, mode="bicubic")[0, 0].clamp(min=0)
                shown = HeatMap(label="", raw=large, image=case.heatmaps.image)
                group.append(overlap(shown.mask(threshold), truth.mask))
        groups.append(group)
    return Mean.of(groups)


def whole_image(cases: Sequence[AttributionCase]) -> Mean:
    """Compute the overlap of a map that lights up everywhere for nouns: the share of the image that they fill."""
    return Mean.of([[t.mask.float().mean().item() for t in case.truths if t.kind == "noun"] for case in cases])


def causality(pipeline: Pipeline, cases: Sequence[AttributionCase]) -> dict[str, dict[str, Mean]]:
    """Correlate the change of an image where a word gets no attention with the word's map, by protocol and kind.

    Pearson's correlation over pixels of the map with the greatest change of a channel, for words that change any. Last
    comes the mask of the objects in place of a map: what is changed is not only they.
    """
    groups: dict[str, dict[str, list[list[float]]]] = {name: {} for name in (*PROTOCOLS, _EXACT)}
    for case in cases:
        assert case.settings is not None
        settings = {name: value for name, value in case.settings.items() if name not in ("prompt", "model")}
        before = pipeline(case.heatmaps.words.text, **settings).images[0]
        found: dict[tuple[str, str], list[float]] = {}
        for truth in case.truths:
            control = suppress(truth.number)
            change = _difference(before, pipeline(case.heatmaps.words.text, **settings, control=control).images[0])
            maps = {name: protocol(case, truth.number).raw for name, protocol in PROTOCOLS.items()}
            for name, heat in (maps | {_EXACT: truth.mask.float()}).items():
                if change.std() > 0 and heat.std() > 0:
                    correlation = torch.corrcoef(torch.stack([heat.flatten(), change.flatten()]))[0, 1].item()
                    found.setdefault((name, truth.kind), []).append(correlation)
        for (name, kind), correlations in found.items():
            groups[name].setdefault(kind, []).append(correlations)
    return {name: {kind: Mean.of(values) for kind, values in sorted(kinds.items())} for name, kinds in groups.items()}


def attribution_report(content: dict[str, Any]) -> Report:
    """Lay out an :class:`Attribution` from JSON."""
    titles = {"own": "own images that the grader found right", "renders": "true scenes, noised"}
    overlaps = [
        _overlap_table(f"Attribution: {title} ({content[name]['images']:,})", content[name])
        for name, title in titles.items()
    ]
    parts = ("text", "bos", "eos", "padding")
    shares = [
        (title, *(f"{content[name]['shares'][part]:.3f}" for part in parts), f"{content[name]['entropy']:.2f}")
        for name, title in titles.items()
        if content[name]["images"]
    ]
    destinations = ReportTable(title="Where attention goes", columns=("images", *parts, "entropy (nats)"), rows=shares)
    return Report(
        title=f"Attribution in {content['model']}",
        description=f"World {content['world']}, {content['captions']:,} captions of the test list.",
        tables=[*overlaps, _causality_table(content["causality"]), destinations],
    )


def _overlap_table(title: str, content: dict[str, Any]) -> ReportTable:
    """Lay out an :class:`ImagesAttribution` from JSON."""
    rows: list[tuple[str, ...]] = []
    thresholds: list[float] = []
    for protocol, measured in content["protocols"].items():
        cells = {(row["kind"], row["threshold"]): row["overlap"] for row in measured["kinds"]}
        thresholds = sorted({threshold for _, threshold in cells})
        for kind in dict.fromkeys(kind for kind, _ in cells):
            row = [cells[kind, threshold] for threshold in thresholds]
            rows.append((kind, protocol, *map(mean_cell, row), f"{row[0]['n']:,} words"))
        if argmax := measured["argmax"]["n"]:
            blank = [""] * (len(thresholds) - 2)
            cell = mean_cell(measured["argmax"])
            rows.append(("nouns, each pixel to one", protocol, "", cell, *blank, f"{argmax:,} words"))
    ceilings = ", ".join(f"1/{scale} {mean_cell(mean)}" for scale, mean in content["ceilings"].items())
    return ReportTable(
        title=title,
        columns=("words", "protocol", *(f"τ = {threshold}" for threshold in thresholds), "of"),
        rows=rows,
        note=(
            f"Mean intersection over union. For nouns at τ = 0.4 a perfect map reaches, by its resolution: {ceilings}; "
            f"one that lights up everywhere: {mean_cell(content['whole_image'])}."
        ),
    )


def _causality_table(content: dict[str, dict[str, Any]]) -> ReportTable:
    """Lay out correlations by protocol and kind of word."""
    kinds = dict.fromkeys(kind for means in content.values() for kind in means)
    rows = []
    for kind in kinds:
        means = [means.get(kind) for means in content.values()]
        words = max(mean["n"] for mean in means if mean)
        rows.append((kind, *map(mean_cell, means), f"{words:,} words"))
    return ReportTable(
        title="Causality: the change where a word gets no attention, and the word's map",
        columns=("words", *content, "of"),
        rows=rows,
        note="Pearson's correlation over the pixels.",
    )


def overlap(found: Tensor, truth: Tensor) -> float:
    """Compute the intersection over union of two bool masks; 1 where both are empty."""
    union = (found | truth).sum().item()
    return (found & truth).sum().item() / union if union else 1.0


def _difference(one: Image.Image, other: Image.Image) -> Tensor:
    """Compute the greatest change of a channel at each pixel, [H, W] in [0, 1]."""
    levels = [torch.from_numpy(np.asarray(image, dtype=np.float32)) / 255 for image in (one, other)]
    return (levels[0] - levels[1]).abs().amax(dim=-1)


def _average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average rows of the same names; empty without any."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def _batches(count: int) -> Iterator[range]:
    """Split ``count`` indices into batches."""
    return (range(start, min(count, start + _BATCH_SIZE)) for start in range(0, count, _BATCH_SIZE))
