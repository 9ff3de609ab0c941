"""Whether words light up what they painted: heat maps against masks that are known.

Two kinds of pictures: what the model paints itself, where the grader found just what the caption asks for, with the
grader's masks; and true renders, noised to several timesteps, with exact masks. By DAAM's protocol (Tang et al. 2022,
arXiv 2210.04885, section 4.1) a word's map, above a threshold τ of its range, is intersected with the mask.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from gobelin.attention import AttentionSite, Trace
from gobelin.control.attention_control import silenced
from gobelin.evaluate.intervals import Z
from gobelin.look.heatmaps import Collector, HeatMap, HeatMaps, sharp_trace
from gobelin.pipeline import Pipeline, to_pil
from gobelin.scenes import Sample, Seen, World, grade, sample
from gobelin.scenes.captions import NOUNS, NUMBERS, Phrasing, pluralised
from gobelin.scenes.colours import COLOURS
from gobelin.scenes.relations import answers, found_in

SEED = 77  # of the scenes, apart from training's
TIMESTEPS = (100, 300, 500, 700, 900)
THRESHOLDS = (0.3, 0.4, 0.5)
BATCH = 16
CAUSAL_PICTURES = 25  # each is painted again for every word


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A word by its number in the caption, of what kind it is, and the pixels that it speaks of, bool [H, W]."""

    number: int
    kind: str
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One picture with its heat maps, all of them with heads apart and sharp ones, and what its words speak of.

    ``settings`` repeat one of its own.
    """

    heatmaps: HeatMaps
    sharp: HeatMaps
    truths: tuple[Truth, ...]
    settings: dict | None = None


Protocol = Callable[[Case, int], HeatMap]
"""(a case, number of the word) -> the word's map."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over ``n`` words in pictures with half of its 95 % interval, which knows which words share a picture."""

    value: float
    margin: float
    n: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[float]]) -> "Mean":
        """Of values in groups: the margin is that of a ratio of sums over independent groups, to first order."""
        sums = np.array([sum(group) for group in groups if group])
        sizes = np.array([len(group) for group in groups if group])
        if not len(sizes):
            return cls(value=float("nan"), margin=float("nan"), n=0)
        value = sums.sum() / sizes.sum()
        spread = (sums - value * sizes).std(ddof=1) if len(sizes) > 1 else float("nan")
        return cls(value=float(value), margin=float(Z * spread * len(sizes) ** 0.5 / sizes.sum()), n=int(sizes.sum()))

    def to_json(self) -> dict[str, float | None]:
        """The fields, None for what there was too little of."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


def measure(pipeline: Pipeline, world: World, count: int, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Everything on ``count`` captions of the test list, as JSON.

    Where the grader finds no picture right, means are None. ``advance`` hears of each picture that is looked into.
    """

    def looked(cases: Iterator[Case]) -> list[Case]:
        return [case for case in cases if advance() is None]

    content: dict[str, Any] = {"captions": count}
    own, true = looked(own_samples(pipeline, world, count)), looked(renders(pipeline, world, count))
    for name, cases in (("own", own), ("renders", true)):
        content[name] = {
            "pictures": len(cases),
            "protocols": {
                protocol: {
                    "intersection": [
                        {"kind": kind, "threshold": threshold, **mean.to_json()}
                        for (kind, threshold), mean in sorted(intersections(cases, function).items())
                    ],
                    "argmax": argmax_intersection(cases, function).to_json(),
                }
                for protocol, function in PROTOCOLS.items()
            },
            "ceilings": {
                str(downscale): ceiling(cases, site).to_json()
                for downscale, site in sorted({site.downscale: site for site in pipeline.unet.attention_sites}.items())
            },
            "whole_image": whole_image(cases).to_json(),
            "shares": _average([case.heatmaps.shares() for case in cases]),
            **_average([{"entropy": case.heatmaps.entropy()} for case in cases]),
        }
    content["causality"] = {
        protocol: {kind: mean.to_json() for kind, mean in kinds.items()}
        for protocol, kinds in causality(pipeline, own[:CAUSAL_PICTURES]).items()
    }
    return content


def own_samples(pipeline: Pipeline, world: World, count: int) -> Iterator[Case]:
    """The pictures of ``count`` captions in which the grader finds what is asked for, and nothing else."""
    for indices in _batches(count):
        samples = [sample(SEED, index, world, "test") for index in indices]
        result = pipeline([each.caption for each in samples], seed=SEED + indices[0], trace=Trace(per_head=True))
        right = [
            (each, heatmaps, masks, settings)
            for each, heatmaps, settings in zip(samples, result.heatmaps, result.settings, strict=True)
            if (masks := found_masks(each.phrasing, grade(heatmaps.picture, world))) is not None
        ]
        if not right:
            continue
        captions, seeds = [each.caption for each, *_ in right], [settings["seed"] for *_, settings in right]
        sharp = pipeline(captions, seed=seeds, trace="sharp").heatmaps  # the same pictures, whatever is traced
        for (each, heatmaps, masks, settings), pointing in zip(right, sharp, strict=True):
            found = truths(each, heatmaps, masks)
            yield Case(heatmaps=heatmaps, sharp=pointing, truths=found, settings=settings)


@torch.no_grad()
def renders(pipeline: Pipeline, world: World, count: int) -> Iterator[Case]:
    """``count`` true scenes, looked at while they are denoised from several timesteps, one U-Net pass each."""
    for indices in _batches(count):
        samples = [sample(SEED, index, world, "test") for index in indices]
        images = torch.from_numpy(np.stack([each.image for each in samples])).permute(0, 3, 1, 2) / 127.5 - 1
        vae, unet = pipeline.vae, pipeline.unet
        latents = vae.images_to_latents(images.to(vae.device, vae.dtype)).float().cpu()
        text_embeddings = pipeline.encode_text([each.caption for each in samples])
        noise = torch.randn(latents.shape, generator=Generator().manual_seed(SEED + indices[0]))
        size = (latents.shape[2], latents.shape[3])
        best = sharp_trace(unet.attention_sites, size)
        plain, sharp = Collector(Trace(per_head=True)), Collector(best)
        for timestep in TIMESTEPS:
            timesteps = torch.full((len(samples),), timestep)
            noisy_latents = pipeline.schedule.add_noise(latents, noise, timesteps).to(unet.device, unet.dtype)
            _, maps = unet.trace(noisy_latents, timesteps.to(unet.device), text_embeddings, reduce="none")
            plain.add(maps)
            if pipeline.schedule.progress(timestep) >= best.start:
                _, maps = unet.trace(noisy_latents, timesteps.to(unet.device), text_embeddings, sites=best.sites)
                sharp.add(maps)
        for place, (each, picture) in enumerate(zip(samples, to_pil(images), strict=True)):
            words = pipeline.tokenizer.words(each.caption)
            heatmaps = HeatMaps(words=words, maps=plain.maps(place), latent_size=size, picture=picture)
            pointing = HeatMaps(words=words, maps=sharp.maps(place), latent_size=size, picture=picture)
            masks = torch.from_numpy(each.masks)
            yield Case(heatmaps=heatmaps, sharp=pointing.sharpened(), truths=truths(each, heatmaps, masks))


def found_masks(phrasing: Phrasing, seen: Sequence[Seen]) -> Tensor | None:
    """The masks [n, H, W] of a caption's objects among what was seen; None where they are not all there, or others are.

    None too where two things answer to what is said of one: whose word lit up could not be told.
    """
    things = [thing for mention in phrasing.mentions for thing in mention.things]
    if len(seen) != len(things) or not found_in(phrasing.wanted, phrasing.relation, seen, count=phrasing.count):
        return None
    masks = torch.zeros(len(things), *seen[0].mask.shape, dtype=torch.bool)
    for mention in phrasing.mentions:
        answering = [thing for thing in seen if answers(mention.wanted, thing)]
        if len(answering) != len(mention.things):
            return None
        for place, thing in zip(mention.things, answering, strict=True):
            masks[place] = torch.from_numpy(thing.mask)
    return masks


def truths(each: Sample, heatmaps: HeatMaps, masks: Tensor) -> tuple[Truth, ...]:
    """What the caption's words speak of, for those that speak of any object and were not cut off."""
    spoken = [(word.strip(","), things) for word, things in each.words]
    found = []
    for number, (span, (word, things)) in enumerate(zip(heatmaps.words.spans, spoken, strict=False)):
        assert span.word == word, "the tokenizer's words are not the caption's"
        if things:
            found.append(Truth(number=number, kind=kind_of(word, len(things)), mask=masks[list(things)].any(dim=0)))
    return tuple(found)


def kind_of(word: str, things: int) -> str:
    """The kind of a word that speaks of so many objects."""
    if word in _NOUNS:
        return "noun"
    if word in COLOURS:
        return "colour"
    if word.isdigit() or word in NUMBERS.values():
        return "number"
    return "relation" if things > 1 else "place"


def daam(case: Case, number: int) -> HeatMap:
    """DAAM's own aggregation: every step, layer and head."""
    return case.heatmaps.daam(number)


def sharpened(case: Case, number: int) -> HeatMap:
    """Gobelin's own: :meth:`gobelin.look.heatmaps.HeatMaps.sharpened`."""
    return case.sharp[number]


PROTOCOLS: dict[str, Protocol] = {"DAAM": daam, "sharp": sharpened}


def intersections(cases: Sequence[Case], protocol: Protocol) -> dict[tuple[str, float], Mean]:
    """Mean intersection over union by kind of word and threshold."""
    values: dict[tuple[str, float], list[list[float]]] = {}
    for case in cases:
        for groups in values.values():
            groups.append([])
        for truth in case.truths:
            heatmap = protocol(case, truth.number)
            for threshold in THRESHOLDS:
                groups = values.setdefault((truth.kind, threshold), [[]])
                groups[-1].append(overlap(heatmap.mask(threshold), truth.mask))
    return {key: Mean.of(groups) for key, groups in values.items()}


def argmax_intersection(cases: Sequence[Case], protocol: Protocol, threshold: float = 0.4) -> Mean:
    """Mean intersection over union where every pixel goes to one noun, or to none where no map exceeds the threshold.

    Of captions with nouns for different objects.
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


def ceiling(cases: Sequence[Case], site: AttentionSite, threshold: float = 0.4) -> Mean:
    """What a perfect map of a site's resolution would reach for nouns: the masks, averaged over its patches."""
    groups = []
    for case in cases:
        group = []
        for truth in case.truths:
            if truth.kind == "noun":
                grid = site.grid(*case.heatmaps.latent_size)
                small = F.interpolate(truth.mask[None, None].float(), size=grid, mode="area")
                large = F.interpolate(small, size=truth.mask.shape, mode="bicubic")[0, 0].clamp(min=0)
                shown = HeatMap(label="", raw=large, picture=case.heatmaps.picture)
                group.append(overlap(shown.mask(threshold), truth.mask))
        groups.append(group)
    return Mean.of(groups)


def whole_image(cases: Sequence[Case]) -> Mean:
    """What a map that lights up everywhere reaches for nouns: the share of the picture that they fill."""
    return Mean.of([[t.mask.float().mean().item() for t in case.truths if t.kind == "noun"] for case in cases])


def causality(pipeline: Pipeline, cases: Sequence[Case]) -> dict[str, dict[str, Mean]]:
    """How the change of a picture, where a word is not looked at, correlates with the word's map: by kind of word.

    Pearson's correlation over pixels of the map with the greatest change of a channel, for words that change any.
    """
    groups: dict[str, dict[str, list[list[float]]]] = {name: {} for name in PROTOCOLS}
    for case in cases:
        assert case.settings is not None
        settings = {name: value for name, value in case.settings.items() if name not in ("prompt", "model")}
        before = pipeline(case.heatmaps.words.text, **settings).images[0]
        found: dict[tuple[str, str], list[float]] = {}
        for truth in case.truths:
            edit = silenced(case.heatmaps.words, truth.number)
            change = _difference(before, pipeline(case.heatmaps.words.text, **settings, edit=edit).images[0])
            for name, protocol in PROTOCOLS.items():
                heat = protocol(case, truth.number).raw
                if change.std() > 0 and heat.std() > 0:
                    correlation = torch.corrcoef(torch.stack([heat.flatten(), change.flatten()]))[0, 1].item()
                    found.setdefault((name, truth.kind), []).append(correlation)
        for (name, kind), correlations in found.items():
            groups[name].setdefault(kind, []).append(correlations)
    return {name: {kind: Mean.of(values) for kind, values in sorted(kinds.items())} for name, kinds in groups.items()}


def overlap(found: Tensor, truth: Tensor) -> float:
    """Intersection over union of two bool masks; 1 where both are empty."""
    union = (found | truth).sum().item()
    return (found & truth).sum().item() / union if union else 1.0


def _difference(one: Image.Image, other: Image.Image) -> Tensor:
    """The greatest change of a channel at each pixel, [H, W] in [0, 1]."""
    levels = [torch.from_numpy(np.asarray(image, dtype=np.float32)) / 255 for image in (one, other)]
    return (levels[0] - levels[1]).abs().amax(dim=-1)


def _average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def _batches(count: int) -> Iterator[range]:
    return (range(start, min(count, start + BATCH)) for start in range(0, count, BATCH))


_NOUNS = frozenset(
    word for nouns in NOUNS.values() for noun in nouns for form in (noun, pluralised(noun)) for word in form.split()
)
