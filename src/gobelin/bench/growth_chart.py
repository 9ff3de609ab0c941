"""The chart of a growth curve: seconds over sizes, both logarithmic, a line a contender, and what would be ideal."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gobelin.bench.marks import CHART_WIDTH, INK, BarMark, LineMark, Mark, TextMark

_LEFT, _RIGHT, _TOP, _HEIGHT, _BELOW = 70, 250, 46, 260, 50
_LEADING = 16  # pixels between names
_POINT = 6  # pixels of a point
_GRID, _IDEAL = "#dddddd", "#777777"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito's
_AXES = {
    "side": "height and width of the latents (one is 8 pixels of an image)",
    "batch": "batch (images)",
    "threads": "threads",
    "processes": "processes of one thread",
}
_IDEALS = {"threads": "ideal: ∝ 1 / threads", "processes": "ideal: as for one"}


@dataclass(frozen=True, kw_only=True)
class _LogAxis:
    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Convert a value to pixels; one that is alone stands in the middle."""
        if self.low == self.high:
            return (self.start + self.end) / 2
        return self.start + (self.end - self.start) * math.log(value / self.low) / math.log(self.high / self.low)


def growth_marks(row: dict[str, Any], title: str, top: float) -> tuple[list[Mark], float]:
    """Place the curves of a growth row, below ``top``; returns the marks, and where they end."""
    curves = _curves(row)
    ideal = _ideal(row)
    seconds = [y for points in [*curves.values(), ideal] for _, y in points]
    ticks = _round_values(min(seconds), max(seconds))
    sizes = [point["at"] for point in row["points"]]
    bottom = top + _TOP + _HEIGHT
    across = _LogAxis(low=sizes[0], high=sizes[-1], start=_LEFT + 20, end=CHART_WIDTH - _RIGHT)
    up = _LogAxis(low=ticks[0], high=ticks[-1], start=bottom, end=top + _TOP)
    calls = "seconds of ten passes in each" if row["along"] == "processes" else "seconds a pass"
    marks: list[Mark] = [TextMark(8, top, title), TextMark(8, top + 20, f"{calls} (logarithmic)", _IDEAL)]
    for tick in ticks:
        y, text = up.place(tick), f"{tick:g} s" if tick >= 1 else f"{1000 * tick:g} ms"
        marks += [
            LineMark((_LEFT, y), (across.end, y), _GRID),
            TextMark(_LEFT - 6, y - 8, text, anchor="end"),
        ]
    for size in sizes:
        x = across.place(size)
        marks += [LineMark((x, bottom), (x, bottom + 4), INK), TextMark(x, bottom + 5, f"{size}", anchor="middle")]
    axis = f"{_AXES[row['along']]}, logarithmic"
    marks += [
        LineMark((_LEFT, bottom), (across.end, bottom), INK),
        TextMark((_LEFT + across.end) / 2, bottom + 22, axis, _IDEAL, anchor="middle"),
    ]

    def placed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(across.place(x), up.place(y)) for x, y in points]

    drawn = placed(ideal)
    marks += [LineMark(one, other, _IDEAL, is_dashed=True) for one, other in pairwise(drawn)]
    names = [(drawn[-1][1], _IDEALS.get(row["along"], "ideal: ∝ operations"), _IDEAL)]
    for number, (name, points) in enumerate(curves.items()):
        colour, drawn = _COLOURS[number % len(_COLOURS)], placed(points)
        marks += [LineMark(one, other, colour, 2) for one, other in pairwise(drawn)]
        marks += [BarMark(x - _POINT / 2, y - _POINT / 2, _POINT, _POINT, colour) for x, y in drawn]
        growth = row["growth"].get(name)
        names.append((drawn[-1][1], name if growth is None else f"{name}: ∝ n^{growth:.2f}", colour))
    marks += [TextMark(across.end + 14, y - 8, text, colour) for y, text, colour in _apart(names, bottom)]
    return marks, bottom + _BELOW


def _curves(row: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """List each contender's (size, seconds), at the sizes at which it was measured."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in row["points"]:
        for name, one in point["contenders"].items():
            curves.setdefault(name, []).append((point["at"], one["median"]))
    return curves


def _ideal(row: dict[str, Any]) -> list[tuple[float, float]]:
    """Continue gobelin's first time in proportion to the operations, shared among the threads."""
    points = row["points"]
    work = [(point["operations"] or 1) / (point["at"] if row["along"] == "threads" else 1) for point in points]
    first = next(iter(points[0]["contenders"].values()))["median"]
    return [(point["at"], first * each / work[0]) for point, each in zip(points, work, strict=True)]


def _round_values(low: float, high: float) -> list[float]:
    """List 1, 2 and 5 times powers of ten, from the last below ``low`` to the first above ``high``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    first = max(number for number, value in enumerate(values) if value <= low * (1 + 1e-9))
    last = min(number for number, value in enumerate(values) if value >= high * (1 - 1e-9))
    return values[first : max(last, first + 1) + 1]


def _apart(names: Sequence[tuple[float, str, str]], bottom: float) -> Iterator[tuple[float, str, str]]:
    """Move names, of (y, text, colour), that would overlap apart, and none below ``bottom``."""
    y = -math.inf
    ordered = sorted(names)
    for number, (wanted, text, colour) in enumerate(ordered):
        y = max(y + _LEADING, min(wanted, bottom - _LEADING * (len(ordered) - 1 - number)))
        yield y, text, colour
