"""Line charts as inline SVG: axes with readable ticks, lines that end in their names, bands, a logarithmic axis.

Lines differ by colour (Okabe and Ito's, which the colour-blind tell apart) and by dashes, for black and white; the
page's style sheet gives the classes their colours.
"""

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 480, 250, 56, 14, 44
_DRAWN = 1e-30, 1e30  # sizes of values that are: no loss is beyond them, and floats have room for the arithmetic
_LONGEST = 20  # letters of a name
_LETTER, _LEADING = 7.7, 15  # pixels: the width of a letter and the distance of lines, in a name


@dataclass(frozen=True, kw_only=True)
class ChartLine:
    """A line through (x, y); ``low`` and ``high`` are the edges of a band around it.

    ``points`` are marked on the line, or shown faintly without one. ``style`` chooses colour and dashes: 0 to 3.
    Points that are not finite, or as good as, are left out, and on a logarithmic axis those that are not positive.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    points: Literal["hidden", "marked", "alone"] = "hidden"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Convert a value to pixels, inside of the axis."""
        value = max(value, self.low)
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * min(1.0, (value - low) / (high - low))

    def ticks(self, most: int) -> list[float]:
        """Choose round values between the ends: 1, 2 or 5 times a power of ten apart, or such values if logarithmic."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1) if self.log else ()
        for digits in ((1, 2, 5), (1,)):
            found = [digit * 10.0**power for power in powers for digit in digits]
            found = [value for value in found if self.low <= value <= self.high]
            if 2 < len(found) <= most:
                return found
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))
        return [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def line_chart(
    lines: Sequence[ChartLine],
    description: str,
    *,
    scale: Literal["linear", "log"] = "linear",
    unit: Literal["", "%"] = "",
    with_zero: bool = False,
) -> str:
    """Draw lines over training steps as an SVG element that fills its container; "" where no point can be drawn.

    ``description`` is what a screen reader says; ``unit`` "%" writes shares in percent; ``with_zero`` shows 0 too.
    """
    drawn = [(line, points) for line in lines if (points := _points(line, scale == "log"))]
    if not drawn:
        return ""
    steps = [x for _, points in drawn for x, _, _ in points]
    right = _WIDTH - max(18.0, 14 + _LETTER * max(len(_name(line)) for line, _ in drawn))
    horizontal = _Axis(low=min(steps), high=max(max(steps), min(steps) + 1), start=_LEFT, end=right)
    vertical = _vertical([value for line, points in drawn for value in _extent(line, points)], scale, with_zero)
    parts = [_grid(horizontal, vertical, unit)]
    parts += [_drawn(line, points, horizontal, vertical) for line, points in drawn]
    for y, line in _spread([(vertical.place(points[-1][1]), line) for line, points in drawn if line.name]):
        at = f'x="{right + 8:.1f}" y="{y + 4:.1f}"'
        parts.append(f'<text class="name c{line.style}" {at}>{html.escape(_name(line))}</text>')
    label = html.escape(description)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _name(line: ChartLine) -> str:
    return line.name if len(line.name) <= _LONGEST else f"{line.name[: _LONGEST - 1]}…"


def _vertical(values: Sequence[float], scale: Literal["linear", "log"], with_zero: bool) -> _Axis:
    """Choose an axis with room for all values, and a little more above and, but for 0, below."""
    start, end = _HEIGHT - _BOTTOM, _TOP
    if scale == "log":
        values = [value for value in values if value > 0]  # a band's lower edge need not be
        return _Axis(low=min(values) / 1.1, high=max(values) * 1.1, start=start, end=end, log=True)
    low, high = (min(0.0, *values), max(0.0, *values)) if with_zero else (min(values), max(values))
    size = max(abs(low), abs(high))
    room = 0.05 * (high - low) if high - low > 1e-6 * size else 0.1 * size or 1.0  # a constant lies in the middle
    return _Axis(low=0.0 if with_zero and not low else low - room, high=high + room, start=start, end=end)


def _points(line: ChartLine, log: bool) -> list[tuple[float, float, int]]:
    """List the points that can be drawn: x, y, and their number in the line."""
    least, most = _DRAWN
    points = [(x, y, number) for number, (x, y) in enumerate(zip(line.x, line.y, strict=True))]
    return [
        (x, y, number) for x, y, number in points if abs(y) < most and (y > least if log else y == 0 or abs(y) > least)
    ]


def _extent(line: ChartLine, points: list[tuple[float, float, int]]) -> list[float]:
    """List the values that an axis has room for: the points' and the band's."""
    edges = [side[number] for side in (line.low, line.high) if side is not None for _, _, number in points]
    return [y for _, y, _ in points] + [value for value in edges if abs(value) < _DRAWN[1]]


def _grid(horizontal: _Axis, vertical: _Axis, unit: str) -> str:
    parts = []
    heights, steps = vertical.ticks(6), horizontal.ticks(4)
    for value, label in zip(heights, _labels(heights, unit), strict=True):
        y = vertical.place(value)
        parts.append(f'<path class="{"zero" if value == 0 else "rule"}" d="M{_LEFT} {y:.1f}H{horizontal.end:.1f}"/>')
        parts.append(f'<text class="tick y" x="{_LEFT - 8}" y="{y + 4:.1f}">{label}</text>')
    for value, label in zip(steps, _labels(steps, ""), strict=True):
        x = horizontal.place(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {vertical.start}v4"/>')
        parts.append(f'<text class="tick x" x="{x:.1f}" y="{vertical.start + 18}">{label}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {vertical.start}H{horizontal.end:.1f}"/>')
    parts.append(f'<text class="tick x" x="{(_LEFT + horizontal.end) / 2:.1f}" y="{_HEIGHT - 6}">step</text>')
    return "".join(parts)


def _drawn(line: ChartLine, points: list[tuple[float, float, int]], horizontal: _Axis, vertical: _Axis) -> str:
    places = [(horizontal.place(x), vertical.place(y)) for x, y, _ in points]
    circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.8"/>' for x, y in places)
    if line.points == "alone":
        return f'<g class="dots c{line.style}">{circles}</g>'
    parts = []
    if line.low is not None and line.high is not None:
        edges = [*((n, line.high) for _, _, n in points), *((n, line.low) for _, _, n in reversed(points))]
        band = [(horizontal.place(line.x[n]), vertical.place(side[n])) for n, side in edges if abs(side[n]) < _DRAWN[1]]
        parts.append(f'<path class="band c{line.style}" d="{_path(band)}Z"/>' if band else "")
    parts.append(f'<path class="line c{line.style}" d="{_path(places)}"/>')
    parts.append(f'<g class="marks c{line.style}">{circles}</g>' if line.points == "marked" or len(places) == 1 else "")
    return "".join(parts)


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _spread(ends: Sequence[tuple[float, ChartLine]]) -> list[tuple[float, ChartLine]]:
    """Move names apart that would lie on each other, and back into the picture."""
    placed: list[tuple[float, ChartLine]] = []
    for y, line in sorted(ends, key=lambda end: end[0]):
        placed.append((max(y, placed[-1][0] + _LEADING) if placed else max(y, _TOP), line))
    limit = float(_HEIGHT - _BOTTOM)
    for number in reversed(range(len(placed))):
        placed[number] = (min(placed[number][0], limit), placed[number][1])
        limit = placed[number][0] - _LEADING
    return placed


def _labels(values: Sequence[float], unit: str) -> list[str]:
    """Write ticks with as many digits as tell them apart, and no more."""
    if unit == "%":
        return [f"{label} %" for label in _labels([100 * value for value in values], "")]
    apart = [after - before for before, after in itertools.pairwise(values)]
    largest = max(map(abs, values), default=0.0)
    digits = 3
    if apart and max(apart) < 1.01 * min(apart):  # those of a logarithmic axis are not even
        if 1e-3 <= largest < 1e7:
            decimals = max(0, -math.floor(math.log10(apart[0]) + 1e-9))
            return [f"{value:,.{decimals}f}".replace("-", "−") for value in values]
        digits = 1 + math.ceil(math.log10(largest / apart[0]))
    return [f"{value:.{digits}g}".replace("-", "−") for value in values]
