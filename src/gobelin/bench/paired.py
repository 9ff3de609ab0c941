"""Paired comparison: contenders take turns, neighbours are divided, and equals show how far apart equals lie.

What slows the machine slows all contenders of a round, so ratios within rounds say more than the seconds do. One
contender is there twice, first and last: no ratio inside of *its* spread is called a difference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np

Verdict = Literal["faster", "level", "slower"]
_QUARTILES = (25, 75)
_SPREAD = (10, 90)  # percentiles: of few rounds nearly all, of many without the outliers


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The median of the ratios of neighbours, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def paired_ratio(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """Compute the ratios of ``one`` to ``other``, round by round."""
    each = np.array(one) / np.array(other)
    low, high = np.percentile(each, _QUARTILES)
    return Ratio(median=float(np.median(each)), low=float(low), high=float(high))


def equals_spread(first: Sequence[float], again: Sequence[float]) -> float:
    """Compute by what factor, 1 or more, two equal contenders come apart in most rounds, either way."""
    logs = np.log(np.array(again) / np.array(first))
    return float(np.exp(np.abs(np.percentile(logs, _SPREAD)).max()))


def verdict(ratio: Ratio, spread: float) -> Verdict:
    """Judge a contender by its time as a multiple of the first one's: "level" unless its quartiles clear ``spread``."""
    if ratio.low > spread:
        return "slower"
    if ratio.high < 1 / spread:
        return "faster"
    return "level"


def take_turns(
    contenders: Mapping[str, Callable[[], float]], rounds: int, enough: Callable[[int], bool] = lambda done: False
) -> dict[str, list[float]]:
    """Let every contender take its turn in each round, in an order that is turned round: A B C, C B A, A B C …

    Each returns what its turn took; collected are these by name. ``enough`` is asked after each round, with the number
    of rounds that are done, whether to leave the others out.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders) if number % 2 == 0 else reversed(list(contenders)):
            taken[name].append(contenders[name]())
        if enough(number + 1):
            break
    return taken


def timed(run: Callable[[], object], calls: int = 1) -> float:
    """Measure the seconds of one call, as a mean over ``calls``."""
    start = perf_counter()
    for _ in range(calls):
        run()
    return (perf_counter() - start) / calls
