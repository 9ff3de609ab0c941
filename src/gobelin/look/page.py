"""One HTML file in which words light up what they painted, and patches rank their words; it needs no network."""

import base64
import html
import io
import json
from importlib.resources import files
from string import Template
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gobelin.look.colour_map import colour_map
from gobelin.look.heatmaps import HeatMaps

GRID = 64  # patches at most, a side


def page(heatmaps: HeatMaps) -> str:
    """The page. Where steps were kept apart, a slider goes through them; its first place is their mean."""
    template = Template(files("gobelin.look").joinpath("page.html").read_text(encoding="utf-8"))
    data = json.dumps(page_data(heatmaps), ensure_ascii=False).replace("<", "\\u003c")
    return template.substitute(title=html.escape(heatmaps.words.text), data=data)


def framed_page(heatmaps: HeatMaps) -> str:
    """The page as a frame, for a notebook."""
    return f'<iframe srcdoc="{html.escape(page(heatmaps))}" width="100%" height="640" style="border: 0"></iframe>'


def page_data(heatmaps: HeatMaps) -> dict[str, Any]:
    """What the page shows, packed: a byte a patch, word and step, of the word's greatest share (``tops``)."""
    count = heatmaps.steps
    parts = [heatmaps, *(heatmaps.select(steps=[step]) for step in range(count))] if count > 1 else [heatmaps]
    shares = torch.stack([_on_grid(part) for part in parts])  # [steps, words, rows, columns]
    tops = shares.amax(dim=(0, 2, 3)).clamp(min=1e-9)
    levels = (shares / tops[:, None, None] * 255).round().byte()
    return {
        "text": _pieces(heatmaps),
        "words": [span.word for span in heatmaps.words.spans],
        "rows": shares.shape[2],
        "columns": shares.shape[3],
        "steps": len(parts),
        "sharp": heatmaps.sharp,
        "tops": [round(top, 6) for top in tops.tolist()],
        "shares": _base64(levels.numpy().tobytes()),
        "colours": _base64(colour_map().tobytes()),
        "picture": picture_url(heatmaps.picture),
    }


def picture_url(picture: Image.Image) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + _base64(buffer.getvalue())


def _on_grid(heatmaps: HeatMaps) -> Tensor:
    """Every word's share [words, rows, columns] on the latents' grid, or on a coarser one where that is large."""
    height, width = heatmaps.latent_size
    scale = min(1.0, GRID / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    shares = [heatmaps.raw(span.tokens, size) for span in heatmaps.words.spans]
    return torch.stack(shares) if shares else torch.zeros(0, *size)


def _pieces(heatmaps: HeatMaps) -> list[tuple[str, int | None]]:
    """The prompt in pieces: words with their numbers, and what stands between them."""
    pieces: list[tuple[str, int | None]] = []
    end = 0
    for number, span in enumerate(heatmaps.words.spans):
        pieces += [(heatmaps.words.text[end : span.start], None), (heatmaps.words.text[span.start : span.end], number)]
        end = span.end
    return [piece for piece in [*pieces, (heatmaps.words.text[end:], None)] if piece[0]]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
