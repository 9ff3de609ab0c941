"""Word sheets: an image and the heat map of each word; by step, layer or head; before and after; and in motion."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from gobelin.formats.files import replacing
from gobelin.look.contact_sheet import Tile, TileRow, captioned_grid
from gobelin.look.heatmaps import HeatMap, HeatMaps
from gobelin.words import Word

WORD_SIDE = 220  # pixels, an image's longer side
GRID_SIDE = 104  # in a grid of many
_WORD_COLUMNS = 5
_WORD_SCALE = "a word's share of a patch's attention: its least", "its most"
_SHARP_SCALE = "a word's share of a patch's attention, sharpened: its least", "its most"
_WEIGHTED_SCALE = "how likely a patch shows what the word speaks of: least", "most"
_GRID_SCALE = "each map from its least share of attention", "to its most"
_FRAME_SECONDS, _LAST_SECONDS = 0.15, 1.5  # the last step is the image: time to look at it


def word_sheet(heatmaps: HeatMaps, words: Sequence[Word]) -> Image.Image:
    """Lay out the image and an overlay for each word, with the word's greatest share of attention.

    Words that were looked for beside the prompt have a row of their own, and so has a negative prompt that was traced.
    """
    rows = [TileRow(tiles=[Tile(image=heatmaps.image), *_word_tiles(heatmaps, words)])]
    if (also := heatmaps.also_traced) is not None:
        tiles = _word_tiles(also, range(len(also.words)))
        rows.append(TileRow(tiles=tiles, heading="Looked for beside the prompt"))
    if (negative := heatmaps.negative_traced) is not None and negative.words.spans:
        tiles = _word_tiles(negative, range(len(negative.words)))
        rows.append(TileRow(tiles=tiles, heading="Negative prompt", note=negative.words.text))
    return captioned_grid(
        rows,
        columns=_WORD_COLUMNS,
        side=WORD_SIDE,
        title=heatmaps.words.text,
        scale=_WORD_SCALE if not heatmaps.sharp else _SHARP_SCALE if heatmaps.head_weights is None else _WEIGHTED_SCALE,
    )


def _word_tiles(heatmaps: HeatMaps, words: Sequence[Word]) -> list[Tile]:
    """Draw a word a tile, with its greatest share."""
    tiles = []
    for word in words:
        heatmap = heatmaps[word]
        most = heatmap.raw.max().item()
        share = f"up to {most:.0%}" if most > 0.0995 else f"up to {most:.1%}"
        if heatmap.unit == "share" and heatmaps.head_weights is not None:
            share = f"share {share}"  # of a token that is no word, beside words' probabilities
        tiles.append(Tile(image=heatmap.overlay(WORD_SIDE), caption=heatmap.label, note=share))
    return tiles


def grid_sheet(title: str, rows: Sequence[tuple[str, Sequence[HeatMap]]]) -> Image.Image:
    """Lay out heat maps in labelled rows: a row a word, a column a step, a layer or a head, each on its own scale."""
    tiles = [
        TileRow(label=label, tiles=[Tile(image=heatmap.overlay(GRID_SIDE)) for heatmap in heatmaps])
        for label, heatmaps in rows
    ]
    first = rows[0][1]
    return captioned_grid(
        tiles,
        columns=len(first),
        side=GRID_SIDE,
        title=title,
        headings=[heatmap.label for heatmap in first],
        scale=_GRID_SCALE,
        gap=6,
    )


def comparison_sheet(images: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Lay out images side by side, each with its caption."""
    tiles = [Tile(image=image, caption=caption) for caption, image in images]
    return captioned_grid([TileRow(tiles=tiles)], columns=len(tiles), side=WORD_SIDE)


def save_animation(file: Path, frames: Sequence[Image.Image], seconds: float = _FRAME_SECONDS) -> None:
    """Write frames of one size as an endless WebP, ``seconds`` each, the last one longer."""
    content = encode_animation(frames, seconds)
    with replacing(file) as temporary:
        temporary.write_bytes(content)


def encode_animation(frames: Sequence[Image.Image], seconds: float = _FRAME_SECONDS) -> bytes:
    """Encode frames of one size as an endless WebP, ``seconds`` each, the last one longer."""
    lasting = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * _LAST_SECONDS)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="WEBP", save_all=True, append_images=frames[1:], duration=lasting, loop=0)
    return buffer.getvalue()
