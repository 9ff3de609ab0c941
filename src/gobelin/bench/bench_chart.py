"""Charts of a benchmark: a bar for each contender of each row, its time as a multiple of gobelin's; SVG or PNG.

Quartiles are a line across the end of the bar; between the thin lines lies what is level. A growth curve is a group of
bars a size.
"""

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from gobelin.bench.bench_report import quantity
from gobelin.formats.files import replacing
from gobelin.look.fonts import draw_text, text_width

_WIDTH, _NAME, _RIGHT, _BAR, _SIZE, _TITLE = 960, 250, 130, 18, 12, 30
_INK, _LEVEL = "#222222", "#bbbbbb"
_COLOURS = {None: "#0072b2", "faster": "#d55e00", "slower": "#56b4e9", "level": "#b0b0b0"}  # Okabe and Ito's
_LEGEND = (
    "Time as a multiple of gobelin's (dark blue), and seconds beside it. Orange is faster, light blue slower; grey is",
    "level, as between the thin lines lies what gobelin differs from itself. Black lines are quartiles.",
)
_SCALE = 3  # pixels of a PNG to one of the drawing


@dataclass(frozen=True)
class _Bar:
    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class _Text:
    x: float
    y: float
    text: str
    colour: str = _INK


_Mark = _Bar | _Text


def write_bench_chart(content: dict[str, Any], file: Path) -> None:
    """Draw a benchmark's ratios into an SVG or PNG file, by its name's end."""
    groups = [(title, row) for title, row in _groups(content["rows"]) if len(row["contenders"]) > 1]
    marks, height = _layout(groups)
    if file.suffix.lower() == ".svg":
        drawn = _svg(marks, height).encode()
    else:
        with BytesIO() as stream:
            _image(marks, height).save(stream, format="PNG")
            drawn = stream.getvalue()
    with replacing(file) as temporary:
        temporary.write_bytes(drawn)


def _groups(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """List what is drawn together: each row, and each size of a growth curve."""
    for row in rows:
        title = f"{row['row']}, {row['precision']}: {row['text']}"
        if "points" in row:
            for point in row["points"]:
                yield f"{title}, {row['along']} {point['at']}", point
        elif "contenders" in row:
            yield title, row


def _layout(groups: list[tuple[str, dict[str, Any]]]) -> tuple[list[_Mark], float]:
    """Place bars and names, from above; returns them, and the height."""
    marks: list[_Mark] = []
    y = 8.0
    longest = _WIDTH - _NAME - _RIGHT
    for title, row in groups:
        marks.append(_Text(8, y, title))
        y += _TITLE - 8
        contenders = row["contenders"]
        most = max(one["ratio"]["high"] for one in contenders.values())
        edges = [edge for edge in (1 / row["spread"], row["spread"]) if math.isfinite(edge) and edge <= most]
        marks += [_Bar(_NAME + longest * edge / most, y, 0.7, _BAR * len(contenders), _LEVEL) for edge in edges]
        for name, one in contenders.items():
            ratio = one["ratio"]
            low, middle, high = (longest * ratio[key] / most for key in ("low", "median", "high"))
            marks += [
                _Text(8, y, name),
                _Bar(_NAME, y + 2, middle, _BAR - 6, _COLOURS[one["verdict"]]),
                _Bar(_NAME + low, y + 2 + (_BAR - 6) / 2 - 0.5, max(high - low, 1), 1, _INK),
                _Text(_NAME + max(middle, high) + 6, y, _label(one, row["unit"])),
            ]
            y += _BAR
        y += 10
    for line in _LEGEND:
        marks.append(_Text(8, y, line))
        y += _BAR
    return marks, y + 8


def _label(one: dict[str, Any], unit: str) -> str:
    value = quantity(one["median"], unit)
    return value if one["verdict"] is None else f"{value} ×{one['ratio']['median']:.2f}"


def _svg(marks: list[_Mark], height: float) -> str:
    """Write marks as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" font-family="sans-serif" '
        f'font-size="{_SIZE}"><rect width="100%" height="100%" fill="white"/>'
    ]
    for mark in marks:
        if isinstance(mark, _Bar):
            size = f'width="{mark.width:.1f}" height="{mark.height:.1f}"'
            parts.append(f'<rect x="{mark.x:.1f}" y="{mark.y:.1f}" {size} fill="{mark.colour}"/>')
        else:
            at = f'x="{mark.x:.1f}" y="{mark.y + _SIZE:.1f}"'
            parts.append(f'<text {at} fill="{mark.colour}">{html.escape(mark.text)}</text>')
    return "".join([*parts, "</svg>\n"])


def _image(marks: list[_Mark], height: float) -> Image.Image:
    """Draw marks."""
    widest = max([_WIDTH, *(mark.x + text_width(mark.text, _SIZE) + 8 for mark in marks if isinstance(mark, _Text))])
    image = Image.new("RGB", (math.ceil(_SCALE * widest), math.ceil(_SCALE * height)), "white")
    draw = ImageDraw.Draw(image)
    for mark in marks:
        x, y = _SCALE * mark.x, _SCALE * mark.y
        if isinstance(mark, _Bar):
            draw.rectangle((x, y, x + _SCALE * mark.width, y + _SCALE * mark.height), fill=mark.colour)
        else:
            draw_text(draw, (x, y), mark.text, _SCALE * _SIZE, mark.colour)
    return image
