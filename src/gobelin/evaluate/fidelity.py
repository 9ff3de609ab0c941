"""Fidelity: the distance of painted images from true ones, FID and KID, and a CLIP score of images and captions.

FID is Heusel et al.'s (2017, arXiv 1706.08500), KID Bińkowski et al.'s (2018, arXiv 1801.01401), both by torchmetrics;
the CLIP score is Hessel et al.'s (2021, arXiv 2104.08718) cosine, times 100 as torchmetrics has it, negative ones too.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from gobelin.evaluate.image_features import (
    ImageFeatures,
    SharedSpace,
    encode_all_captions,
    encode_in_batches,
    require_package,
)
from gobelin.evaluate.image_sets import ImageSet
from gobelin.evaluate.intervals import Mean
from gobelin.evaluate.measurement_report import Report, ReportTable, as_json

_SUBSETS, _MOST_IN_SUBSET = 100, 1000  # of KID's, as in the paper's code

_READING = (
    "Lower is nearer. FID is biased upwards by few images, and KID is not: compare only figures of the same features, "
    "the same true images, and as many of both."
)


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """KID: its mean over random subsets of both sides, and its standard deviation over them.

    Subsets are of ``subset_size`` images. Where that is half of them, the deviation is 1.2 to 1.5 times the mean's
    standard error; below, it says less of the mean.
    """

    mean: float
    std: float
    subset_size: int


@dataclass(frozen=True, kw_only=True)
class ImageDistance:
    """The distance of ``count`` images from the true ones."""

    images: str
    count: int
    fid: float
    kid: KernelDistance


@dataclass(frozen=True, kw_only=True)
class CLIPScores:
    """CLIP scores by the network that ``features`` describes: 100 × the cosine of images and captions.

    ``shuffled`` is of the painted images with all captions but their own, None where all captions are the same;
    ``true`` of the true images with their captions, None where they have none.
    """

    features: str
    painted: Mean
    shuffled: Mean | None
    true: Mean | None


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Distances of images from ``count`` true ones in ``num_features`` features, and CLIP scores where asked for.

    ``settings`` say how the images were painted, and ``resized`` and ``left_out`` count images by side: those that were
    not ``size`` pixels square, and those that could not be used, by the reason.
    """

    painted: str
    true: str
    count: int
    size: int
    features: str
    num_features: int
    settings: dict[str, Any]
    resized: dict[str, int]
    left_out: dict[str, dict[str, int]]
    distances: list[ImageDistance]
    clip: CLIPScores | None

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers."""
        return as_json(self)


def measure_fidelity(
    name: str,
    true: ImageSet,
    painted: Iterable[UInt8[np.ndarray, "height width 3"]],
    features: ImageFeatures,
    *,
    captions: Sequence[str] | None = None,
    clip: SharedSpace | None = None,
    others: ImageSet | None = None,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Fidelity:
    """Measure the distance of painted images from true ones, each image read once.

    ``others`` are other true images, those of the painted ones' captions where there are such: their distance is what
    a perfect painter would have. The painted images must not be of the captions of ``true``: pairs of one caption are
    alike, and make both FID and KID too low. ``captions`` are those of the painted images, for CLIP scores by ``clip``.
    ``advance`` is called with the number of images of each batch.
    """
    networks = [features] if clip is None or clip is features else [features, clip]
    encoded = encode_in_batches(painted, networks, advance)
    of_true = encode_in_batches(true, networks, advance)
    of_others = None if others is None else encode_in_batches(others, networks, advance)
    distances = [image_distance("painted", of_true[0], encoded[0], seed)]
    if of_others is not None:
        distances.append(image_distance("other true images", of_true[0], of_others[0], seed))
    scores = None
    if clip is not None and captions is not None:
        texts = encode_all_captions(clip, captions)
        mark, of_mark = (true, of_true) if others is None or of_others is None else (others, of_others)
        of_captions = None if mark.captions is None else (of_mark[-1], encode_all_captions(clip, mark.captions))
        scores = clip_scores(clip.description, (encoded[-1], texts), captions, of_captions)
    sides = {"true": true} | ({"painted": painted} if isinstance(painted, ImageSet) else {})
    return Fidelity(
        painted=name,
        true=true.images.source.resolve().name,
        count=len(true),
        size=true.size,
        features=features.description,
        num_features=of_true[0].shape[1],
        settings=settings or {},
        resized={side: images.resized for side, images in sides.items()},
        left_out={side: dict(images.images.index.reasons) for side, images in sides.items()},
        distances=distances,
        clip=scores,
    )


def image_distance(
    images: str, true: Float[Tensor, "true features"], others: Float[Tensor, "others features"], seed: int = 0
) -> ImageDistance:
    """Measure the distance of images from true ones, by the features of both; ``images`` names them."""
    return ImageDistance(
        images=images, count=len(others), fid=frechet_distance(true, others), kid=kernel_distance(true, others, seed)
    )


def frechet_distance(true: Float[Tensor, "true features"], others: Float[Tensor, "others features"]) -> float:
    """Compute FID of features: ‖μ − μ′‖² + tr(Σ + Σ′ − 2 (ΣΣ′)^½), in float64; at least 2 images a side."""
    metric = require_package("torchmetrics.image.fid").FrechetInceptionDistance(_Given(true.shape[1]))
    metric.update(true.double(), real=True)
    metric.update(others.double(), real=False)
    return float(metric.compute())


def kernel_distance(
    true: Float[Tensor, "true features"], others: Float[Tensor, "others features"], seed: int = 0
) -> KernelDistance:
    """Compute KID of features: the unbiased MMD² with (x·y / features + 1)³, over 100 random subsets.

    A subset has 1,000 images of each side, but no more than half of the smaller one: of nearly all images, subsets
    would differ by nothing, and the standard deviation would say that KID is known exactly.
    """
    size = min(_MOST_IN_SUBSET, len(true) // 2, len(others) // 2)
    kid = require_package("torchmetrics.image.kid").KernelInceptionDistance
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that features are kept in memory
        torch.manual_seed(seed)
        metric = kid(_Given(true.shape[1]), subsets=_SUBSETS, subset_size=size)
        metric.update(true.double(), real=True)
        metric.update(others.double(), real=False)
        mean, std = metric.compute()
    return KernelDistance(mean=float(mean), std=float(std), subset_size=size)


def clip_scores(
    features: str,
    painted: tuple[Float[Tensor, "painted features"], Float[Tensor, "painted features"]],
    captions: Sequence[str],
    true: tuple[Float[Tensor, "true features"], Float[Tensor, "true features"]] | None,
) -> CLIPScores:
    """Compute CLIP scores of (images, texts) by side; ``captions`` are those of the painted images."""
    images, texts = (F.normalize(side, dim=-1) for side in painted)
    own, counts = 100 * (images * texts).sum(dim=-1), Counter(captions)
    same = torch.tensor([counts[caption] for caption in captions], dtype=own.dtype)
    others = (100 * images @ texts.sum(dim=0) - same * own) / (len(captions) - same)  # the mean over other captions
    return CLIPScores(
        features=features,
        painted=_mean(own),
        shuffled=_mean(others) if len(counts) > 1 else None,
        true=None if true is None else _mean(100 * F.cosine_similarity(*true)),
    )


def fidelity_report(content: dict[str, Any]) -> Report:
    """Lay out a :class:`Fidelity` from JSON."""
    count, size, features = content["count"], content["size"], content["num_features"]
    rows = [
        (
            row["images"],
            f"{row['count']:,}",
            f"{row['fid']:.2f}",
            f"{row['kid']['mean']:.5f} ± {row['kid']['std']:.5f}",
        )
        for row in content["distances"]
    ]
    kid = content["distances"][0]["kid"]
    notes = [
        f"Features: {content['features']}, {features:,}. {_READING} KID is the mean over {_SUBSETS} random subsets of "
        f"{kid['subset_size']:,} images of each side, ± its standard deviation over them."
    ]
    fewest = min(count, *(row["count"] for row in content["distances"]))
    if fewest <= features:
        notes.append(
            f"FID IS NOT RELIABLE HERE: {fewest:,} images have no covariance of {features:,} features that can be "
            f"inverted. Go by KID, or give more than {features:,} images."
        )
    if len(rows) > 1:
        notes.append("Other true images: as near as a perfect painter comes, with as many images.")
    notes += [
        f"{number:,} {side} images are not {size}×{size}: scaled, and cropped to the middle square."
        for side, number in content["resized"].items()
        if number
    ]
    notes += [
        f"Left out of the {side} images: {', '.join(f'{reason}: {number:,}' for reason, number in reasons.items())}."
        for side, reasons in content["left_out"].items()
        if reasons
    ]
    said = ", ".join(f"{name} {value}" for name, value in content["settings"].items())
    return Report(
        title=f"Fidelity of {content['painted']}",
        description=f"{content['painted']} beside {count:,} true images of {content['true']}, at {size}×{size} pixels"
        + (f"; {said}" if said else ""),
        tables=[
            ReportTable(
                title=f"Distance from {count:,} true images",
                columns=("images", "number", "FID", "KID"),
                rows=rows,
                note=" ".join(notes),
            ),
            *_clip_tables(content["clip"]),
        ],
    )


def _clip_tables(content: dict[str, Any] | None) -> list[ReportTable]:
    """Lay out :class:`CLIPScores` from JSON; no table for None."""
    if content is None:
        return []
    rows = [
        (name, f"{mean['n']:,}", f"{mean['value']:.2f} ± {mean['margin']:.2f}")
        for name, mean in (
            ("painted, with their captions", content["painted"]),
            ("painted, with captions of others", content["shuffled"]),
            ("true, with their captions", content["true"]),
        )
        if mean is not None
    ]
    return [
        ReportTable(
            title="CLIP score",
            columns=("images", "number", "score"),
            rows=rows,
            note=f"100 × cosine by {content['features']}, with 95 % intervals. Captions of others are the baseline, "
            "and true images the mark to reach: a score says nothing without the two.",
        )
    ]


def _mean(scores: Float[Tensor, " images"]) -> Mean:
    return Mean.of([[score] for score in scores.tolist()])


class _Given(nn.Module):
    """Pass features on, as the network of a metric: those are computed once for all metrics."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Float[Tensor, "images features"]) -> Float[Tensor, "images features"]:
        return features
