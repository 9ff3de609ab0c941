"""Marks of a chart, bars, lines and texts in pixels, and their drawing as SVG or PNG."""

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

from gobelin.formats.files import replacing
from gobelin.look.fonts import draw_text, text_width

CHART_WIDTH = 960
INK = "#222222"
_SIZE = 12  # of letters
_DASH = 6  # pixels of a dash, and of the gap after it
_SCALE = 3  # pixels of a PNG to one of the drawing


@dataclass(frozen=True)
class BarMark:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class LineMark:
    """A straight line from one point to another."""

    start: tuple[float, float]
    end: tuple[float, float]
    colour: str
    width: float = 1
    is_dashed: bool = False


@dataclass(frozen=True)
class TextMark:
    """A line of text below ``y``, of which ``anchor`` stands at ``x``."""

    x: float
    y: float
    text: str
    colour: str = INK
    anchor: Literal["start", "middle", "end"] = "start"


Mark = BarMark | LineMark | TextMark


def write_marks(marks: Sequence[Mark], height: float, file: Path) -> None:
    """Draw marks into an SVG or PNG file, by its name's end."""
    if file.suffix.lower() == ".svg":
        drawn = _svg(marks, height).encode()
    else:
        with BytesIO() as stream:
            _image(marks, height).save(stream, format="PNG")
            drawn = stream.getvalue()
    with replacing(file) as temporary:
        temporary.write_bytes(drawn)


def _svg(marks: Sequence[Mark], height: float) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {CHART_WIDTH} {height:.0f}" font-family="sans-serif" '
        f'font-size="{_SIZE}"><rect width="100%" height="100%" fill="white"/>'
    )
    return "".join([head, *map(_element, marks), "</svg>\n"])


def _element(mark: Mark) -> str:
    """Write a mark as an SVG element."""
    match mark:
        case BarMark():
            size = f'width="{mark.width:.1f}" height="{mark.height:.1f}"'
            return f'<rect x="{mark.x:.1f}" y="{mark.y:.1f}" {size} fill="{mark.colour}"/>'
        case LineMark():
            (x1, y1), (x2, y2) = mark.start, mark.end
            dashes = f' stroke-dasharray="{_DASH}"' if mark.is_dashed else ""
            at = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
            return f'<line {at} stroke="{mark.colour}" stroke-width="{mark.width:g}"{dashes}/>'
        case TextMark():
            at = f'x="{mark.x:.1f}" y="{mark.y + _SIZE:.1f}" text-anchor="{mark.anchor}"'
            return f'<text {at} fill="{mark.colour}">{html.escape(mark.text)}</text>'


def _image(marks: Sequence[Mark], height: float) -> Image.Image:
    texts = [mark for mark in marks if isinstance(mark, TextMark)]
    widest = max([CHART_WIDTH, *(_left(mark) + text_width(mark.text, _SIZE) + 8 for mark in texts)])
    image = Image.new("RGB", (math.ceil(_SCALE * widest), math.ceil(_SCALE * height)), "white")
    draw = ImageDraw.Draw(image)
    for mark in marks:
        match mark:
            case BarMark():
                x, y = _SCALE * mark.x, _SCALE * mark.y
                draw.rectangle((x, y, x + _SCALE * mark.width, y + _SCALE * mark.height), fill=mark.colour)
            case LineMark():
                for piece in _pieces(mark):
                    scaled = [_SCALE * value for value in piece]
                    draw.line(scaled, fill=mark.colour, width=max(1, round(_SCALE * mark.width)))
            case TextMark():
                draw_text(draw, (_SCALE * _left(mark), _SCALE * mark.y), mark.text, _SCALE * _SIZE, mark.colour)
    return image


def _left(mark: TextMark) -> float:
    """Find where a text begins."""
    return mark.x - {"start": 0, "middle": 0.5, "end": 1}[mark.anchor] * text_width(mark.text, _SIZE)


def _pieces(mark: LineMark) -> Iterator[tuple[float, float, float, float]]:
    """Cut a dashed line into its dashes."""
    (x1, y1), (x2, y2) = mark.start, mark.end
    length = math.hypot(x2 - x1, y2 - y1)
    if not mark.is_dashed or not length:
        yield x1, y1, x2, y2
        return
    for begin in range(0, math.ceil(length), 2 * _DASH):
        one, other = begin / length, min(1.0, (begin + _DASH) / length)
        yield x1 + one * (x2 - x1), y1 + one * (y2 - y1), x1 + other * (x2 - x1), y1 + other * (y2 - y1)
