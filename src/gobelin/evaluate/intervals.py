"""Confidence intervals of shares and means, wider where outcomes come in groups that are alike."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 1_000
_Z = 1.959964  # 95 % of a normal distribution lie within this many standard deviations


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of ``n`` trials with its 95 % interval: all in [0, 1], and NaN where nothing was tried."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, outcomes: Sequence[bool], groups: Sequence[Hashable] | None = None) -> "Share":
        """Compute the share of True, with Wilson's interval (1927).

        ``groups`` names the group of each outcome, as images belong to prompts. Outcomes of one group are alike and
        tell less than as many independent ones, so Wilson's formula gets the effective number of trials: n divided
        by the design effect, the variance of the share between groups over that of independent trials (Franco et
        al. 2019, "Comparative study of confidence intervals for proportions in complex sample surveys"). No random
        numbers are drawn.
        """
        n, hits = len(outcomes), sum(outcomes)
        if not n:
            return cls(value=math.nan, low=math.nan, high=math.nan, n=0)
        value, worth = hits / n, n / (1.0 if groups is None else _design_effect(outcomes, groups))
        centre = (value * worth + _Z * _Z / 2) / (worth + _Z * _Z)
        half = _Z / (worth + _Z * _Z) * math.sqrt(worth * value * (1 - value) + _Z * _Z / 4)
        # the clamps are for rounding, at shares of 0 and 1
        return cls(value=value, low=max(0.0, min(value, centre - half)), high=min(1.0, max(value, centre + half)), n=n)

    @classmethod
    def mean(cls, shares: Sequence["Share"]) -> "Share":
        """Compute the mean of independent shares of equal weight, with an interval made of theirs.

        Each side of the interval is the root of the sum of squares of the shares' own sides (Zou and Donner 2008,
        "MOVER"), so that it keeps their asymmetry, and has a width where all shares are 1.
        """
        count = len(shares)
        if not count:
            return cls(value=math.nan, low=math.nan, high=math.nan, n=0)
        value = sum(share.value for share in shares) / count
        below = math.hypot(*(share.value - share.low for share in shares)) / count
        above = math.hypot(*(share.high - share.value for share in shares)) / count
        return cls(
            value=value, low=max(0.0, value - below), high=min(1.0, value + above), n=sum(share.n for share in shares)
        )

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean of ``n`` values with half of its 95 % interval; NaN where there are too few."""

    value: float
    margin: float
    n: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[float]]) -> "Mean":
        """Compute the mean of values in independent groups, such as words in images.

        The margin is that of a ratio of sums over groups, to first order.
        """
        sums = np.array([sum(group) for group in groups if group])
        sizes = np.array([len(group) for group in groups if group])
        if not len(sizes):
            return cls(value=math.nan, margin=math.nan, n=0)
        value = sums.sum() / sizes.sum()
        spread = (sums - value * sizes).std(ddof=1) if len(sizes) > 1 else math.nan
        margin = _Z * spread * len(sizes) ** 0.5 / sizes.sum()
        return cls(value=float(value), margin=float(margin), n=int(sizes.sum()))


@dataclass(frozen=True, kw_only=True)
class Auc:
    """The area under the ROC curve, with its 95 % interval: how often a score tells one that is from one that is not.

    0.5 is chance; NaN where all are of one kind. ``n`` counts both.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, scores: Sequence[float], present: Sequence[bool], groups: Sequence[Hashable]) -> "Auc":
        """Compute the share of pairs in which what is present scores higher; ties count half.

        The interval is that of 1,000 resamples of whole ``groups``, such as images, always the same ones.
        """
        names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
        values, truths = np.array(scores, dtype=float), np.array(present, dtype=bool)
        members = np.array([names[name] for name in groups], dtype=int)
        rng = np.random.default_rng(0)
        resampled = []
        for _ in range(_RESAMPLES):
            weights = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[members]
            resampled.append(_weighted_auc(values, truths, weights))
        low, high = np.nanquantile(resampled, [0.025, 0.975]) if not np.isnan(resampled).all() else (np.nan, np.nan)
        value = _weighted_auc(values, truths, np.ones(len(values)))
        return cls(value=value, low=float(low), high=float(high), n=len(values))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _weighted_auc(scores: np.ndarray, present: np.ndarray, weights: np.ndarray) -> float:
    """Compute the area under the curve where each score counts ``weights`` times; NaN where all are of one kind."""
    _, ranks = np.unique(scores, return_inverse=True)
    there = np.bincount(ranks, weights * present)
    absent = np.bincount(ranks, weights * ~present, minlength=len(there))
    pairs = there.sum() * absent.sum()
    below = np.cumsum(absent) - absent
    return float((there * (below + absent / 2)).sum() / pairs) if pairs else math.nan


def _design_effect(outcomes: Iterable[bool], groups: Sequence[Hashable]) -> float:
    """Compute the design effect: the variance of a share of grouped outcomes over that of independent ones.

    It is at least 1 and at most the mean size of a group, where all outcomes of a group are the same. The variance
    is that of a ratio between groups, with two more groups pretended, one all right and one all wrong: where
    (almost) all outcomes are the same they do not tell whether groups are alike, and the worst case is taken.
    """
    names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    hits, sizes = np.zeros(len(names)), np.zeros(len(names))
    for right, name in zip(outcomes, groups, strict=True):
        hits[names[name]] += right
        sizes[names[name]] += 1
    typical = sizes.mean()
    hits, sizes = np.append(hits, (typical, 0.0)), np.append(sizes, (typical, typical))
    share, n, count = hits.sum() / sizes.sum(), sizes.sum(), len(sizes)
    between = count / (count - 1) * np.square(hits - share * sizes).sum() / n**2
    return float(np.clip(between / (share * (1 - share) / n), 1.0, max(1.0, typical)))
