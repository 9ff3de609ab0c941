"""Shares of right pictures, with intervals that know that pictures of one prompt are alike."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959964  # 95 % of a normal distribution lie within this many standard deviations


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of ``n`` trials with its 95 % interval: all in [0, 1], and NaN where nothing was tried."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, outcomes: Sequence[bool], groups: Sequence[Hashable] | None = None) -> "Share":
        """The share of True, with Wilson's interval (1927).

        ``groups`` names for each outcome what it belongs to, as pictures belong to prompts. Outcomes of a group
        are alike and tell less than as many independent ones, so Wilson's formula is given as many trials as they
        are worth: n divided by the design effect, the variance of the share between groups over that of
        independent trials (Franco et al. 2019, "Comparative study of confidence intervals for proportions in
        complex sample surveys"). No random numbers are drawn.
        """
        n, hits = len(outcomes), sum(outcomes)
        if not n:
            return cls(value=math.nan, low=math.nan, high=math.nan, n=0)
        value, worth = hits / n, n / (1.0 if groups is None else _design_effect(outcomes, groups))
        centre = (value * worth + Z * Z / 2) / (worth + Z * Z)
        half = Z / (worth + Z * Z) * math.sqrt(worth * value * (1 - value) + Z * Z / 4)
        # the clamps are for rounding, at shares of 0 and 1
        return cls(value=value, low=max(0.0, min(value, centre - half)), high=min(1.0, max(value, centre + half)), n=n)

    @classmethod
    def mean(cls, shares: Sequence["Share"]) -> "Share":
        """The mean of independent shares, each weighing the same; its interval is put together from theirs.

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


def _design_effect(outcomes: Iterable[bool], groups: Sequence[Hashable]) -> float:
    """How many times more a share of grouped outcomes varies than one of as many independent ones.

    It is at least 1 and at most the mean size of a group, where all outcomes of a group are the same. The variance
    is that of a ratio between groups, with two more groups pretended, one all right and one all wrong: where
    (almost) all outcomes are the same they say nothing of how alike groups are, and the worst case is taken.
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
