"""Charts of a benchmark: a bar for each contender of each row, its time as a multiple of gobelin's; SVG or PNG.

Quartiles are a line across the end of the bar; between the thin lines lies what is level. A growth row is a chart of
curves.
"""

import math
from pathlib import Path
from typing import Any

from gobelin.bench.bench_report import quantity
from gobelin.bench.growth_chart import growth_marks
from gobelin.bench.marks import CHART_WIDTH, INK, BarMark, Mark, TextMark, write_marks

_NAME, _RIGHT, _BAR, _TITLE = 250, 130, 18, 22
_LEVEL = "#bbbbbb"
_COLOURS = {None: "#0072b2", "faster": "#d55e00", "slower": "#56b4e9", "level": "#b0b0b0"}  # Okabe and Ito's
_LEGEND = (
    "Time as a multiple of gobelin's (dark blue), and seconds beside it. Orange is faster, light blue slower; grey is",
    "level, as between the thin lines lies what gobelin differs from itself. Black lines are quartiles.",
)


def write_bench_chart(content: dict[str, Any], file: Path) -> None:
    """Draw a benchmark's ratios and growth curves into an SVG or PNG file, by its name's end."""
    marks: list[Mark] = []
    y = 8.0
    has_bars = False
    for row in content["rows"]:
        title = f"{row['row']}, {row['precision']}: {row['text']}"
        if "points" in row:
            drawn, y = growth_marks(row, title, y)
        elif len(row.get("contenders", ())) > 1:
            has_bars = True
            drawn, y = _bars(row, title, y)
        else:
            continue  # nothing to be compared with
        marks += drawn
    for line in _LEGEND if has_bars else ():
        marks.append(TextMark(8, y, line))
        y += _BAR
    write_marks(marks, y + 8, file)


def _bars(row: dict[str, Any], title: str, top: float) -> tuple[list[Mark], float]:
    """Place a row's bars and names, below ``top``; returns the marks, and where they end."""
    marks: list[Mark] = [TextMark(8, top, title)]
    y = top + _TITLE
    longest = CHART_WIDTH - _NAME - _RIGHT
    contenders = row["contenders"]
    most = max(one["ratio"]["high"] for one in contenders.values())
    edges = [edge for edge in (1 / row["spread"], row["spread"]) if math.isfinite(edge) and edge <= most]
    marks += [BarMark(_NAME + longest * edge / most, y, 0.7, _BAR * len(contenders), _LEVEL) for edge in edges]
    for name, one in contenders.items():
        ratio = one["ratio"]
        low, middle, high = (longest * ratio[key] / most for key in ("low", "median", "high"))
        marks += [
            TextMark(8, y, name),
            BarMark(_NAME, y + 2, middle, _BAR - 6, _COLOURS[one["verdict"]]),
            BarMark(_NAME + low, y + 2 + (_BAR - 6) / 2 - 0.5, max(high - low, 1), 1, INK),
            TextMark(_NAME + max(middle, high) + 6, y, _label(one, row["unit"])),
        ]
        y += _BAR
    return marks, y + 10


def _label(one: dict[str, Any], unit: str) -> str:
    value = quantity(one["median"], unit)
    return value if one["verdict"] is None else f"{value} ×{one['ratio']['median']:.2f}"
