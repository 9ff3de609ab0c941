"""The word map as HTML: one file that needs no network, and an element for notebooks.

Both are the custom element of ``word_map.js`` with its data as JSON beside it.
"""

import base64
import html
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.images import data_url
from gobelin.look.colour_map import colour_map
from gobelin.look.heatmaps import HeatMaps
from gobelin.words import TokenKind, Words

StepShares = Float[Tensor, "steps words rows columns"]
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
  @media (prefers-color-scheme: dark) {{ body {{ background: #17191c; color: #a5abb5; }} }}
</style>
<main>
<h1>Which word painted which pixel</h1>
{element}
</main>
</html>
"""


def word_map_page(heatmaps: HeatMaps, steps: StepShares | None = None, parts: Sequence[TokenKind] = ()) -> str:
    """Write the page. Where steps were kept apart, a slider goes through them; its first place is their mean.

    Behind the prompt's words stand those that were looked for beside it, those of a negative prompt that was traced,
    and the ``parts`` of the tokens that are asked for: "bos", "eos", "padding".
    """
    return _PAGE.format(title=html.escape(heatmaps.words.text), element=word_map_element(heatmaps, steps, parts))


def word_map_element(heatmaps: HeatMaps, steps: StepShares | None = None, parts: Sequence[TokenKind] = ()) -> str:
    """Write the element with its data and its definition, as a notebook shows it; a page may hold several."""
    # In a script only "<" can end the JSON or begin a comment; JSON has another spelling for it.
    data = json.dumps(word_map_data(heatmaps, steps, parts), ensure_ascii=False).replace("<", "\\u003c")
    script = files("gobelin.look").joinpath("word_map.js").read_text(encoding="utf-8")
    element = f'<word-map><script type="application/json">{data}</script></word-map>'
    return f'{element}\n<script type="module">\n{script}</script>'


def word_map_data(
    heatmaps: HeatMaps, steps: StepShares | None = None, parts: Sequence[TokenKind] = ()
) -> dict[str, Any]:
    """Pack the data of a word map: a byte a patch, word and step, in units of the word's greatest share (``tops``).

    The first ``ranked`` words, those of the prompt and those beside it, are ranked at a patch; then come words of the
    negative prompt, and ``parts``; the first ``weighted`` are by head weights. ``steps`` are the :func:`word_shares` of
    each step, where they were taken while painting; without them they are those of the steps that the heat maps keep
    apart, if any.
    """
    if steps is None:
        apart = range(heatmaps.steps) if heatmaps.steps > 1 else ()
        kept = [word_shares(heatmaps.select(steps=[step]), parts) for step in apart]
    else:
        kept = list(steps)
    shares = torch.stack([word_shares(heatmaps, parts), *kept])  # [steps, words, rows, columns]
    tops = shares.amax(dim=(0, 2, 3)).clamp(min=1e-9)
    levels = (shares / tops[:, None, None] * 255).round().byte()
    groups = _groups(heatmaps, parts)
    return {
        "text": [*split_prompt(heatmaps.words), *_list_groups(groups, len(heatmaps.words))],
        "words": [word for group in groups for word, _ in group.words],
        "ranked": sum(len(group.words) for group in groups if group.is_ranked),
        "rows": shares.shape[2],
        "columns": shares.shape[3],
        "steps": len(shares),
        "sharp": heatmaps.sharp,
        "weighted": sum(len(group.words) for group in groups if group.heatmaps.head_weights is not None),
        "tops": [round(top, 6) for top in tops.tolist()],
        "shares": _base64(levels.numpy().tobytes()),
        "colours": _base64(colour_map().tobytes()),
        "image": data_url(heatmaps.image),
    }


class _Group(NamedTuple):
    """Words of one kind, each with its tokens' positions in the group's heat maps."""

    heading: str
    heatmaps: HeatMaps
    words: list[tuple[str, tuple[int, ...]]]
    is_ranked: bool


def _groups(heatmaps: HeatMaps, parts: Sequence[TokenKind]) -> list[_Group]:
    """Group what is shown: the prompt's words first."""

    def spoken(heading: str, one: HeatMaps, is_ranked: bool) -> _Group:
        return _Group(heading, one, [(span.word, span.tokens) for span in one.words.spans], is_ranked)

    found = [spoken("", heatmaps, True)]
    if heatmaps.also_traced is not None:
        found.append(spoken("looked for beside it", heatmaps.also_traced, True))
    if heatmaps.negative_traced is not None and heatmaps.negative_traced.steps == heatmaps.steps:
        found.append(spoken("negative prompt", heatmaps.negative_traced, False))
    named: list[tuple[str, tuple[int, ...]]] = [(part, heatmaps.words.part(part)) for part in parts]
    return [*found, _Group("tokens that are no words", heatmaps.unweighted(), named, False)]


def _list_groups(groups: Sequence[_Group], number: int) -> Iterator[tuple[str, int | None]]:
    """List the words of all groups but the first as text, each word with its number, from ``number`` on."""
    for group in groups[1:]:
        for place, (word, _) in enumerate(group.words):
            yield (", " if place else f" — {group.heading}: "), None
            yield word, number
            number += 1


def word_shares(heatmaps: HeatMaps, parts: Sequence[TokenKind] = ()) -> Float[Tensor, "words rows columns"]:
    """Compute words' shares on the latents' grid, or on a coarser one where that is large."""
    height, width = heatmaps.latent_size
    scale = min(1.0, _MOST_SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    shares = [
        group.heatmaps.token_shares([tokens for _, tokens in group.words], size)
        for group in _groups(heatmaps, parts)
        if group.words
    ]
    return torch.cat(shares) if shares else torch.zeros(0, *size)


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
