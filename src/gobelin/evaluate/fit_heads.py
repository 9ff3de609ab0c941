"""Fit head weights: which heads of attention point, found on scenes whose masks are exact.

True scenes of the development split are looked at, and a logistic regression from the features of
:mod:`gobelin.head_weights` to the share of each patch that a word's objects cover is fitted for nouns and colours. It
is convex, so that the same scenes give the same weights. What it brings is measured on other scenes of that split.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gobelin.attention import AttentionSite, Trace, choose_sites
from gobelin.errors import UsageError
from gobelin.evaluate.attribution import (
    ATTRIBUTION_SEED,
    AttributionCase,
    argmax_intersection,
    intersections,
    sharpened,
    word_truths,
)
from gobelin.evaluate.intervals import Mean
from gobelin.evaluate.measurement_report import Report, ReportTable, as_json, mean_cell
from gobelin.head_weights import HeadWeights, head_features
from gobelin.look.heatmaps import HeatMaps
from gobelin.look.sharp_maps import sharp_trace
from gobelin.pipeline import Pipeline
from gobelin.scenes import Sample, World, sample

_FIT_SEED = 78  # of the scenes that weights are fitted to
_TIMESTEPS = (20, 100)  # each is a case of its own
_KINDS = ("noun", "colour")  # words that speak of one object's pixels
_THRESHOLD = 0.4
_BATCH_SIZE = 16
_RIDGE = 1e-5  # holds weights of features that say the same
_LEAST_SPREAD = 0.02  # of a feature: the weight of one that hardly moves would be of its rounding


@dataclass(frozen=True, kw_only=True)
class HeadsMeasurement:
    """Overlaps of words' maps with their objects in true scenes, sharp without head weights and with them.

    By the kind of word, ``argmax`` for nouns with each pixel given to one of them; τ is 0.4.
    """

    model: str
    world: str
    fitted_to: int
    scenes: int
    plain: dict[str, Mean]
    weighted: dict[str, Mean]

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers."""
        return as_json(self)


def fit_heads(pipeline: Pipeline, world: World, count: int, advance: Callable[[], None] = lambda: None) -> HeadWeights:
    """Fit head weights to ``count`` true scenes, each looked at twice; ``advance`` is called after each look.

    Raises :class:`UsageError` where no caption names a shape or a colour.
    """
    sites = _level_sites(pipeline)
    cross, own = ({site.name: site.heads for site in sites if site.kind == kind} for kind in ("cross", "self"))
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for each, heatmaps in _looked_scenes(pipeline, world, _FIT_SEED, count, Trace(sites=sites, per_head=True)):
        rows += _regression_rows(each, heatmaps)
        advance()
    if not rows:
        raise UsageError(f"no caption of {count} scenes names a shape or a colour: give more scenes")
    features, covered, weights = (torch.cat(part) for part in zip(*rows, strict=True))
    found, bias = _logistic_regression(features, covered, weights)
    return HeadWeights(cross=cross, own=own, weights=found, bias=bias)


def measure_heads(
    pipeline: Pipeline,
    world: World,
    head_weights: HeadWeights,
    fitted_to: int,
    count: int,
    advance: Callable[[], None] = lambda: None,
) -> HeadsMeasurement:
    """Measure what head weights bring in ``count`` true scenes that they were not fitted to."""
    trace = Trace(sharp=True, head_weights=head_weights)
    plain, weighted = [], []
    for each, heatmaps in _looked_scenes(pipeline, world, ATTRIBUTION_SEED, count, trace, timesteps=_TIMESTEPS[:1]):
        truths = word_truths(each, heatmaps, torch.from_numpy(each.masks))
        for cases, maps in ((plain, heatmaps.unweighted()), (weighted, heatmaps)):
            cases.append(AttributionCase(heatmaps=maps, sharp=maps, looked=maps, truths=truths))
        advance()
    return HeadsMeasurement(
        model=pipeline.name,
        world=world.name,
        fitted_to=fitted_to,
        scenes=len(plain),
        plain=_overlaps(plain),
        weighted=_overlaps(weighted),
    )


def heads_report(content: dict[str, Any]) -> Report:
    """Lay out a :class:`HeadsMeasurement` from JSON."""
    rows = [
        (title, *(mean_cell(content[maps].get(kind)) for maps in ("plain", "weighted")))
        for kind, title in (("noun", "noun"), ("argmax", "nouns, each pixel to one"), ("colour", "colour"))
    ]
    table = ReportTable(
        title=f"Sharp maps of true scenes ({content['scenes']:,}), with the objects' masks",
        columns=("words", "without head weights", "with them"),
        rows=rows,
        note=f"Mean intersection over union at τ = {_THRESHOLD}, looked at.",
    )
    return Report(
        title=f"Head weights of {content['model']}",
        description=f"World {content['world']}; fitted to {content['fitted_to']:,} other scenes.",
        tables=[table],
    )


def _level_sites(pipeline: Pipeline) -> list[AttentionSite]:
    """List all attention of the level that sharp maps are made of, the encoder's too."""
    sites, size = pipeline.unet.attention_sites, pipeline.latent_size()
    level = {site.grid(*size) for site in choose_sites(sites, sharp_trace(sites, size).sites)}
    return [site for site in sites if site.grid(*size) in level]


def _looked_scenes(
    pipeline: Pipeline,
    world: World,
    seed: int,
    count: int,
    trace: Trace,
    timesteps: Sequence[int] = _TIMESTEPS,
) -> Iterator[tuple[Sample, HeatMaps]]:
    """Render true scenes of the development split, and look at each at every timestep apart."""
    for start in range(0, count, _BATCH_SIZE):
        samples = [sample(seed, index, world, "dev") for index in range(start, min(count, start + _BATCH_SIZE))]
        images, captions = [Image.fromarray(each.image) for each in samples], [each.caption for each in samples]
        looked = [pipeline.look(images, captions, timesteps=[timestep], trace=trace) for timestep in timesteps]
        for maps in looked:
            yield from zip(samples, maps, strict=True)


def _regression_rows(each: Sample, heatmaps: HeatMaps) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Make rows for each word: features [patches, F], the share of each patch that is covered, and its weight.

    Words weigh as one over the square root of their pixels: small objects count, and do not outweigh large ones.
    """
    of_kind = {
        kind: torch.cat([probs[0] for site, probs in heatmaps.maps.items() if site.kind == kind])
        for kind in ("cross", "self")
    }
    (grid,) = {site.grid(*heatmaps.latent_size) for site in heatmaps.maps}
    bos = of_kind["cross"][..., list(heatmaps.words.part("bos"))].sum(dim=-1)
    for truth in word_truths(each, heatmaps, torch.from_numpy(each.masks)):
        if truth.kind in _KINDS:
            tokens = list(heatmaps.words.spans[truth.number].tokens)
            share = of_kind["cross"][..., tokens].sum(dim=-1)
            features = head_features(share[None], bos[None], of_kind["self"])[0].T
            covered = F.interpolate(truth.mask[None, None].float(), size=grid, mode="area").flatten()
            yield features, covered, covered.sum().clamp(min=1).rsqrt().expand_as(covered)


def _logistic_regression(features: Tensor, covered: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Minimise the weighted cross-entropy plus a ridge, over standardised features; returns weights and bias."""
    mean, spread = features.mean(dim=0), features.std(dim=0).clamp(min=_LEAST_SPREAD)
    standard = (features - mean) / spread
    found, bias = torch.zeros(features.shape[1], requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([found, bias], max_iter=60, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        errors = F.binary_cross_entropy_with_logits(standard @ found + bias, covered, weights)
        value = errors / weights.mean() + _RIDGE * found.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    raw = (found / spread).detach()
    return raw, (bias.detach() - raw @ mean).item()


def _overlaps(cases: Sequence[AttributionCase]) -> dict[str, Mean]:
    by_kind = intersections(cases, sharpened)
    chosen = {kind: mean for (kind, threshold), mean in by_kind.items() if threshold == _THRESHOLD}
    return chosen | {"argmax": argmax_intersection(cases, sharpened)}
