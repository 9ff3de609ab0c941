"""Sheets: a picture and what each word painted in it; step by step, layer by layer or head by head; and in motion."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from gobelin.formats.files import replacing
from gobelin.look.colour_map import LEVELS, colour_map
from gobelin.look.drawing import INK, PALE, PAPER, font, framed, wrapped
from gobelin.look.heatmaps import HeatMap, HeatMaps
from gobelin.tokenizer import Word

COLUMNS = 5
CELL = 220  # pixels, a picture's longer side
SMALL_CELL = 104  # in a grid of many
GAP, MARGIN = 18, 32
TITLE, LABEL, NOTE = 24, 15, 12
WORD_SCALE = "a word's share of a patch's attention: its least", "its most"
SHARP_SCALE = "a word's share of a patch's attention, sharpened: its least", "its most"
GRID_SCALE = "each picture from its least share of attention", "to its most"
BAR = LEVELS // 2  # pixels


def word_sheet(heatmaps: HeatMaps, words: Sequence[Word]) -> Image.Image:
    """The picture, then an overlay a word with its greatest share of attention, and the scale of the colours."""
    scale = SHARP_SCALE if heatmaps.sharp else WORD_SCALE
    picture = _fitted(heatmaps.picture, CELL)
    cells = [(picture, "", "")]
    for word in words:
        heatmap = heatmaps[word]
        cells.append((heatmap.overlay(CELL), heatmap.label, f"up to {heatmap.raw.max().item():.0%}"))
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    width = 2 * MARGIN + max(columns * picture.width + (columns - 1) * GAP, _scale_width(*scale))
    title = wrapped(heatmaps.words.text, width - 2 * MARGIN, TITLE, 3)
    top = MARGIN + len(title) * (TITLE + 8) + 8
    step = picture.height + LABEL + 24
    sheet = Image.new("RGB", (width, top + rows * step + 44), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(title):
        draw.text((MARGIN, MARGIN - 10 + number * (TITLE + 8)), line, fill=INK, font=font(TITLE))
    for place, (image, label, share) in enumerate(cells):
        x, y = MARGIN + place % columns * (picture.width + GAP), top + place // columns * step
        framed(sheet, draw, image, x, y)
        draw.text((x, y + picture.height + 6), label, fill=INK, font=font(LABEL))
        beside = x + picture.width - font(LABEL).getlength(share)
        draw.text((beside, y + picture.height + 6), share, fill=PALE, font=font(LABEL))
    _draw_scale(sheet, draw, MARGIN, top + rows * step, *scale)
    return sheet


def grid_sheet(title: str, rows: Sequence[tuple[str, Sequence[HeatMap]]]) -> Image.Image:
    """Heat maps in rows with names: a row a word, a column a step, a layer or a head, each on its own scale."""
    first = rows[0][1]
    cell = _fitted(first[0].picture, SMALL_CELL).size
    beside = int(max(font(LABEL).getlength(name) for name, _ in rows)) + 16
    width = 2 * MARGIN + max(beside + len(first) * (cell[0] + 6), _scale_width(*GRID_SCALE))
    above = max(len(_heading(heatmap.label, cell[0])) for heatmap in first) * 14 + 6
    lines = wrapped(title, width - 2 * MARGIN, TITLE, 3)
    top = MARGIN + len(lines) * (TITLE + 8) + 6 + above
    sheet = Image.new("RGB", (width, top + len(rows) * (cell[1] + 6) + 44), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN - 10 + number * (TITLE + 8)), line, fill=INK, font=font(TITLE))
    for row, (name, heatmaps) in enumerate(rows):
        y = top + row * (cell[1] + 6)
        draw.text((MARGIN, y + cell[1] // 2 - LABEL // 2), name, fill=INK, font=font(LABEL))
        for column, heatmap in enumerate(heatmaps):
            x = MARGIN + beside + column * (cell[0] + 6)
            framed(sheet, draw, heatmap.overlay(SMALL_CELL), x, y)
            if row == 0:
                for number, line in enumerate(_heading(heatmap.label, cell[0])):
                    draw.text((x, top - above + number * 14), line, fill=PALE, font=font(11))
    bottom = top + len(rows) * (cell[1] + 6) + 4
    _draw_scale(sheet, draw, MARGIN, bottom, *GRID_SCALE)
    return sheet


def comparison_sheet(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures side by side, what they are beneath."""
    shown = [(wrapped(label, CELL, LABEL, 3), _fitted(picture, CELL)) for label, picture in pictures]
    height = max(picture.height for _, picture in shown)
    width = 2 * MARGIN + sum(picture.width for _, picture in shown) + GAP * (len(shown) - 1)
    below = max(len(lines) for lines, _ in shown) * (LABEL + 5) + 10
    sheet = Image.new("RGB", (width, 2 * MARGIN + height + below), PAPER)
    draw = ImageDraw.Draw(sheet)
    x = MARGIN
    for lines, picture in shown:
        framed(sheet, draw, picture, x, MARGIN)
        for number, line in enumerate(lines):
            draw.text((x, MARGIN + height + 10 + number * (LABEL + 5)), line, fill=INK, font=font(LABEL))
        x += picture.width + GAP
    return sheet


def save_animation(file: Path, frames: Sequence[Image.Image], seconds: float = 0.15) -> None:
    """Write frames as an endless WebP, ``seconds`` each, the last of them longer."""
    lasting = [round(1000 * seconds)] * (len(frames) - 1) + [1500]
    with replacing(file) as temporary:
        frames[0].save(temporary, format="WEBP", save_all=True, append_images=frames[1:], duration=lasting, loop=0)


def _heading(label: str, width: int) -> list[str]:
    return wrapped(label, width, 11, 3)


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """A picture enlarged or reduced to a longer side in pixels."""
    scale = side / max(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _draw_scale(sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, low: str, high: str) -> None:
    """The colours from low to high, and what they stand for."""
    bar = Image.fromarray(np.repeat(colour_map()[None], 12, axis=0)).resize((BAR, 12))
    draw.text((x, y), low, fill=PALE, font=font(NOTE))
    x += int(font(NOTE).getlength(low)) + 8
    sheet.paste(bar, (x, y + 2))
    draw.text((x + BAR + 8, y), high, fill=PALE, font=font(NOTE))


def _scale_width(low: str, high: str) -> int:
    return int(font(NOTE).getlength(low) + font(NOTE).getlength(high)) + BAR + 20
