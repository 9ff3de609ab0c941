"""Contact sheet: images in rows with captions, notes, labels, headings, a title and a colour scale."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from gobelin.look.colour_map import LEVELS, colour_map
from gobelin.look.fonts import draw_text, text_width, wrap_text

INK, PALE, LINEN, RED, PAPER = "#1f2328", "#6b7280", "#d8d5cc", "#c8102e", "#fbfaf7"

SHEET_MARGIN = 32  # pixels around everything, as all below
_TITLE, _HEADING, _CAPTION, _SMALL = 26, 20, 15, 13
_FOOTER = 24  # the colour scale and the room above it
_LEADING = 1.3  # the distance of lines, of the letters' size
_LINES = 5  # of a caption, a note, a column's heading or a title, at most: the longest caption of a scene has four
_FAILED = 4  # the frame of a failure, plain to see beside the thin line of the others


@dataclass(frozen=True, kw_only=True)
class Tile:
    """An image, its caption beneath it, and a pale note beneath that; if ``failed``, a red note and a red frame."""

    image: Image.Image
    caption: str = ""
    note: str = ""
    failed: bool = False


@dataclass(frozen=True, kw_only=True)
class TileRow:
    """Tiles side by side; ``label`` stands at their left, ``heading`` above them with a pale ``note`` beside it."""

    tiles: Sequence[Tile]
    label: str = ""
    heading: str = ""
    note: str = ""


def captioned_grid(
    rows: Sequence[TileRow],
    *,
    columns: int,
    side: int,
    title: str = "",
    headings: Sequence[str] = (),
    scale: tuple[str, str] | None = None,
    gap: int = 18,
    text: int = _CAPTION,
) -> Image.Image:
    """Lay out images in a grid with their captions, as an RGB image.

    A row of more than ``columns`` tiles goes on in the next line. ``side`` is an image's longer side in pixels, and
    ``gap`` the pixels between two; ``headings`` stand above the columns; ``scale`` is what the lowest and the highest
    colour of the heat maps' colour map stand for; ``text`` is the captions' size.
    """
    lines = [line for row in rows for line in _lines(row, columns, side, text)]
    wide = max((cell.image.width for line in lines for cell in line.cells), default=side)
    left = max((text_width(line.label, text) for line in lines), default=0)
    left = SHEET_MARGIN + (round(left) + 16 if left else 0)
    inner = [left - SHEET_MARGIN + max((len(line.cells) for line in lines), default=1) * (wide + gap) - gap]
    inner += [round(_heading_width(line)) for line in lines] + ([_scale_width(*scale)] if scale else [])
    width = 2 * SHEET_MARGIN + max(inner)

    titles = wrap_text(title, width - 2 * SHEET_MARGIN, _TITLE, _LINES) if title else []
    tops = [wrap_text(heading, wide, _SMALL, _LINES) for heading in headings]
    top = SHEET_MARGIN + (_height(len(titles), _TITLE) + 10 if titles else 0)
    first = top + (_height(max(map(len, tops)), _SMALL) + 4 if tops else 0)
    height = first + sum(line.height(gap, text) for line in lines) + (_FOOTER if scale else -gap) + SHEET_MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_lines(draw, SHEET_MARGIN, SHEET_MARGIN, titles, _TITLE, INK)
    for column, heading in enumerate(tops):
        _draw_lines(draw, left + column * (wide + gap), top, heading, _SMALL, PALE)
    y = first
    for line in lines:
        _draw_line(sheet, draw, line, left, y, wide + gap, text)
        y += line.height(gap, text)
    if scale:
        _draw_scale(sheet, draw, SHEET_MARGIN, y + _FOOTER - 16, *scale)
    return sheet


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A tile at its size in pixels, its text in lines."""

    image: Image.Image
    caption: list[str]
    note: list[str]
    failed: bool


@dataclass(frozen=True, kw_only=True)
class _Line:
    """Cells that stand side by side."""

    cells: list[_Cell]
    label: str
    heading: str
    note: str

    @property
    def above(self) -> int:
        """Pixels over the images."""
        return _height(1, _HEADING) + 10 if self.heading else _height(1, _CAPTION) + 4 if self.note else 0

    @property
    def images(self) -> int:
        """The highest image's pixels."""
        return max((cell.image.height for cell in self.cells), default=0)

    def height(self, gap: int, text: int) -> int:
        """Pixels to the next line's top."""
        beneath = max((len(cell.caption) + len(cell.note) for cell in self.cells), default=0)
        return self.above + self.images + (_height(beneath, text) + 8 if beneath else 0) + gap


def _lines(row: TileRow, columns: int, side: int, text: int) -> list[_Line]:
    cells = []
    for tile in row.tiles:
        image = fit_image(tile.image, side)
        caption, note = (
            wrap_text(words, image.width, text, _LINES) if words else [] for words in (tile.caption, tile.note)
        )
        cells.append(_Cell(image=image, caption=caption, note=note, failed=tile.failed))
    lines = [_Line(cells=cells[:columns], label=row.label, heading=row.heading, note=row.note)]
    rest = range(columns, len(cells), columns)
    return lines + [_Line(cells=cells[at : at + columns], label="", heading="", note="") for at in rest]


def fit_image(image: Image.Image, side: int) -> Image.Image:
    """Enlarge or reduce an image to a longer side in pixels, smoothly."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _draw_line(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, line: _Line, left: int, y: int, step: int, text: int
) -> None:
    draw_text(draw, (SHEET_MARGIN, y), line.heading, _HEADING, INK)
    beside = SHEET_MARGIN + (text_width(line.heading, _HEADING) + 14 if line.heading else 0)
    draw_text(draw, (beside, y + (0.85 * (_HEADING - _CAPTION) if line.heading else 0)), line.note, _CAPTION, PALE)
    y += line.above
    draw_text(draw, (SHEET_MARGIN, y + line.images / 2 - text / 2), line.label, text, INK)
    for column, cell in enumerate(line.cells):
        x = left + column * step
        edge, colour = (_FAILED, RED) if cell.failed else (1, LINEN)
        box = (x - edge, y - edge, x + cell.image.width + edge - 1, y + cell.image.height + edge - 1)
        draw.rectangle(box, fill=colour)
        sheet.paste(cell.image, (x, y))
        below = y + line.images + 8
        _draw_lines(draw, x, below, cell.caption, text, INK)
        below += _height(len(cell.caption), text)
        _draw_lines(draw, x, below, cell.note, text, RED if cell.failed else PALE)


def _draw_lines(draw: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[str], size: int, fill: str) -> None:
    for number, line in enumerate(lines):
        draw_text(draw, (x, y + _height(number, size)), line, size, fill)


def _draw_scale(sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, low: str, high: str) -> None:
    """Draw the colour map between what its lowest and its highest colour stand for."""
    bar = Image.fromarray(np.repeat(colour_map()[None], 12, axis=0)).resize((LEVELS // 2, 12))
    draw_text(draw, (x, y), low, _SMALL, PALE)
    x += round(text_width(low, _SMALL)) + 8
    sheet.paste(bar, (x, y + 1))
    draw_text(draw, (x + bar.width + 8, y), high, _SMALL, PALE)


def _scale_width(low: str, high: str) -> int:
    return round(text_width(low, _SMALL) + text_width(high, _SMALL)) + LEVELS // 2 + 16


def _heading_width(line: _Line) -> float:
    return text_width(line.heading, _HEADING) + text_width(line.note, _CAPTION) + 14


def _height(lines: int, size: int) -> int:
    """Pixels of lines of text."""
    return round(lines * _LEADING * size)
