"""``gobelin look``: which word painted which pixel."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageChops
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from gobelin.attention import AttentionSite, Trace
from gobelin.cli.options import parse, write_report
from gobelin.cli.painting import PaintingOptions, paint
from gobelin.errors import UsageError
from gobelin.formats.files import replacing, write_text
from gobelin.formats.png import read_png_settings, save_picture
from gobelin.look.heatmaps import HeatMap, HeatMaps
from gobelin.look.page import page
from gobelin.look.sheet import grid_sheet, save_animation, word_sheet
from gobelin.pipeline import Pipeline, Result, picture_name
from gobelin.tokenizer import Word

MOST_COLUMNS = 12  # steps in a grid


@dataclass(frozen=True, kw_only=True)
class Look(PaintingOptions):
    """See which word painted which pixel: of a prompt, or of a picture that Gobelin painted.

    Writes a sheet with an overlay a word, and an HTML page in which pointing at a word lights up what it painted, and
    pointing at the picture ranks the words behind that patch. The shares are of attention without BOS.

    Some examples:
      gobelin look "a red circle left of a blue square" --seed 3
      gobelin look out/a-red-circle-7.png --words circle "red circle" --per step
      gobelin look "three green rings" --at 20 31 --animation
      gobelin look "a red circle" --sites "up_blocks.*" --json words.json --npz maps.npz
    """

    source: Positional[str]
    """A prompt in quotes, or a PNG file that Gobelin wrote: that picture is painted again as it says."""
    words: tuple[str, ...] = ()
    """Words or phrases to look at; without any, every word."""
    per: Literal["step", "layer", "head"] | None = None
    """Also a grid: a row a word, a column a step, a layer or a head."""
    at: tuple[int, int] | None = None
    """Column and row of a pixel: the words behind it, and the patches that it draws on."""
    sites: str | None = None
    """A pattern of attention sites, such as "up_blocks.*"; without one, all that see words."""
    animation: bool = False
    """Also an animation over the steps (WebP)."""
    json: Path | None = None
    """Write each word's shares here, and where they are greatest."""
    npz: Path | None = None
    """Write the maps here: words [W, H, W'], and every site's [steps, heads, patches, tokens]."""


def run(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(Look, "look", arguments)
    pipeline = options.open()
    previews: list[Image.Image] = []
    result = painted(options, pipeline, previews)
    whole = result.heatmaps[0]
    heatmaps = (whole if options.sites is None else whole.select(sites=options.sites)).without("bos")
    words: list[Word] = list(options.words or range(len(heatmaps.words)))
    name = picture_name(result.settings[0])
    files = {f"{name}-words.png": word_sheet(heatmaps, words)}
    if options.per is not None:
        files[f"{name}-per-{options.per}.png"] = grid(heatmaps, words, options.per)
    if options.at is not None:
        ranked = heatmaps.words_at(*options.at)
        table = Table(title=f"Words behind the pixel at {options.at[0]}, {options.at[1]}")
        for column in ("word", "share"):
            table.add_column(column)
        for span, share in ranked:
            table.add_row(span.word, f"{share:.1%}")
        Console().print(table)
        drawn = whole.patches_for(*options.at)
        files[f"{name}-at-{options.at[0]}-{options.at[1]}.png"] = drawn.overlay(512)
    for file, sheet in files.items():
        save_picture(options.out / file, sheet)
        print(options.out / file)
    write_text(options.out / f"{name}.html", page(heatmaps))
    print(options.out / f"{name}.html")
    if options.animation:
        frames = [
            word_sheet(replace(heatmaps.select(steps=[step]), picture=preview), words)
            for step, preview in enumerate(previews)
        ]
        save_animation(options.out / f"{name}.webp", frames)
        print(options.out / f"{name}.webp")
    write_report(options.json, {**summary(heatmaps, words), "settings": result.settings[0]})
    if options.npz is not None:
        write_npz(options.npz, heatmaps, words)


def painted(options: Look, pipeline: Pipeline, previews: list[Image.Image]) -> Result:
    """The picture with its maps: painted from the prompt, or again from what a PNG says of itself."""
    file = Path(options.source)
    again = file.suffix.lower() == ".png" and file.is_file()
    if file.suffix.lower() == ".png" and not again:
        raise UsageError(f"there is no picture at {file}: give a PNG that Gobelin painted, or a prompt")
    settings = options.settings()
    prompt = options.source
    if again:
        settings = read_png_settings(file)
        prompt = settings.pop("prompt")
        settings.pop("model")
    per_step = options.per == "step" or options.animation
    trace = Trace(sites=seen_by(options), per_head=options.per == "head", per_step=per_step)
    show = (lambda step: previews.append(step.preview())) if options.animation else lambda step: None
    result = paint(pipeline, [prompt], {**settings, "trace": trace}, show)
    if again:
        with Image.open(file) as before:
            most = int(np.asarray(ImageChops.difference(before.convert("RGB"), result.images[0])).max())
        if most:
            Console(stderr=True).print(
                f"gobelin: painted again, {file} differs by up to {most} of 255 levels: another model or machine made "
                "it, and the maps are of the new picture"
            )
    return result


def seen_by(options: Look) -> Any:
    """The sites to trace: what sees words, and what sees patches where a pixel's are asked for."""
    if options.at is not None:
        return "*"
    return options.sites


def grid(heatmaps: HeatMaps, words: Sequence[Word], per: str) -> Image.Image:
    """A row a word, a column a step, a layer or a head."""
    parts: list[tuple[str, HeatMaps]] = []
    if per == "step":
        chosen = np.linspace(0, heatmaps.steps - 1, min(MOST_COLUMNS, heatmaps.steps)).round().astype(int).tolist()
        parts = [(f"step {step + 1}", heatmaps.select(steps=[step])) for step in chosen]
    elif per == "layer":
        cross = [site for site in heatmaps.maps if site.kind == "cross"]
        parts = [(_short(site), heatmaps.select(sites=[site])) for site in cross]
    else:
        heads = min(site.heads for site in heatmaps.maps)
        parts = [(f"head {head}", heatmaps.select(heads=[head])) for head in range(heads)]
    rows: list[tuple[str, list[HeatMap]]] = [
        (heatmaps[word].label, [replace(part[word], label=label) for label, part in parts]) for word in words
    ]
    return grid_sheet(heatmaps.words.text, rows)


def summary(heatmaps: HeatMaps, words: Sequence[Word]) -> dict[str, Any]:
    """Each word's mean and greatest share, and where that is; where attention goes as a whole."""
    rows = []
    for word in words:
        raw = heatmaps[word].raw
        row, column = divmod(int(raw.argmax()), raw.shape[1])
        rows.append(
            {
                "word": heatmaps[word].label,
                "tokens": list(heatmaps.words.tokens(word)),
                "mean": raw.mean().item(),
                "most": raw.max().item(),
                "most_at": [column, row],
            }
        )
    return {"prompt": heatmaps.words.text, "words": rows, "shares": heatmaps.shares(), "entropy": heatmaps.entropy()}


def write_npz(file: Path, heatmaps: HeatMaps, words: Sequence[Word]) -> None:
    """The maps as NumPy arrays."""
    arrays: dict[str, Any] = {site.name: probs.cpu().numpy() for site, probs in heatmaps.maps.items()}
    arrays["words"] = np.array([heatmaps[word].label for word in words])
    arrays["maps"] = heatmaps.stacked(words).cpu().numpy()
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


def _short(site: AttentionSite) -> str:
    """A site's name without what all have in common."""
    return site.name.replace(".transformer_blocks.0.attn2", "").replace(".attentions.", " ").replace("_blocks.", " ")
