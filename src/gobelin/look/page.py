"""The word map as HTML: one file that needs no network, and an element for notebooks.

Both are the custom element of ``word_map.js`` with its data as JSON beside it.
"""

import base64
import html
import json
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from gobelin.images import data_url
from gobelin.look.colour_map import colour_map
from gobelin.look.heatmaps import HeatMaps
from gobelin.words import Words

_MOST_SIDE = 64  # a side: finer ones are too small to point at, and each costs a byte a word and step

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ margin: 0; background: #fbfaf7; color: #5f6773; font: 14px/1.5 system-ui, sans-serif; }}
  h1 {{ max-width: 940px; margin: 20px auto -14px; padding: 0 20px; font: inherit; }}
  @media (max-width: 640px) {{ h1 {{ padding: 0 14px; }} }}
</style>
<main>
<h1>Which word painted which pixel</h1>
{element}
</main>
</html>
"""


def word_map_page(heatmaps: HeatMaps) -> str:
    """Write the page. Where steps were kept apart, a slider goes through them; its first place is their mean."""
    return _PAGE.format(title=html.escape(heatmaps.words.text), element=word_map_element(heatmaps))


def word_map_element(heatmaps: HeatMaps) -> str:
    """Write the element with its data and its definition, as a notebook shows it; a page may hold several."""
    # In a script only "<" can end the JSON or begin a comment; JSON has another spelling for it.
    data = json.dumps(word_map_data(heatmaps), ensure_ascii=False).replace("<", "\\u003c")
    script = files("gobelin.look").joinpath("word_map.js").read_text(encoding="utf-8")
    element = f'<word-map><script type="application/json">{data}</script></word-map>'
    return f'{element}\n<script type="module">\n{script}</script>'


def word_map_data(heatmaps: HeatMaps) -> dict[str, Any]:
    """Pack the data of a word map: a byte a patch, word and step, in units of the word's greatest share (``tops``)."""
    count = heatmaps.steps
    parts = [heatmaps, *(heatmaps.select(steps=[step]) for step in range(count))] if count > 1 else [heatmaps]
    shares = torch.stack([_on_grid(part) for part in parts])  # [steps, words, rows, columns]
    tops = shares.amax(dim=(0, 2, 3)).clamp(min=1e-9)
    levels = (shares / tops[:, None, None] * 255).round().byte()
    return {
        "text": split_prompt(heatmaps.words),
        "words": [span.word for span in heatmaps.words.spans],
        "rows": shares.shape[2],
        "columns": shares.shape[3],
        "steps": len(parts),
        "sharp": heatmaps.sharp,
        "tops": [round(top, 6) for top in tops.tolist()],
        "shares": _base64(levels.numpy().tobytes()),
        "colours": _base64(colour_map().tobytes()),
        "image": data_url(heatmaps.image),
    }


def _on_grid(heatmaps: HeatMaps) -> Tensor:
    """Compute words' shares [words, rows, columns] on the latents' grid, or on a coarser one where that is large."""
    height, width = heatmaps.latent_size
    scale = min(1.0, _MOST_SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    shares = [heatmaps.token_share(span.tokens, size) for span in heatmaps.words.spans]
    return torch.stack(shares) if shares else torch.zeros(0, *size)


def split_prompt(words: Words) -> list[tuple[str, int | None]]:
    """Split a prompt into its words with their numbers, and the text between them with None."""
    pieces: list[tuple[str, int | None]] = []
    end = 0
    for number, span in enumerate(words.spans):
        pieces += [(words.text[end : span.start], None), (words.text[span.start : span.end], number)]
        end = span.end
    return [piece for piece in [*pieces, (words.text[end:], None)] if piece[0]]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
