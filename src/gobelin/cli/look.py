"""``gobelin look``: which word painted which pixel."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageChops
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tyro.conf import Positional

from gobelin.attention import AttentionSite, Trace, choose_sites
from gobelin.cli.options import parse, write_report
from gobelin.cli.painting import NEEDED, PaintingOptions, paint, refuse_others, repeatable
from gobelin.errors import DataError, UsageError
from gobelin.formats.files import replacing, write_text
from gobelin.formats.png import read_png_settings, save_picture
from gobelin.look.heatmaps import MOST_PATCHES, HeatMap, HeatMaps, sharp_trace
from gobelin.look.page import word_map_page
from gobelin.look.word_sheets import grid_sheet, save_animation, word_sheet
from gobelin.pipeline import Pipeline, picture_name
from gobelin.prompt_weighting import Style
from gobelin.tokenizer import Word

MOST_COLUMNS = 12  # steps in a grid


@dataclass(frozen=True, kw_only=True)
class Look(PaintingOptions):
    """See which word painted which pixel: of a prompt, or of a picture that Gobelin painted.

    Writes a sheet with an overlay a word, and an HTML page in which pointing at a word lights up what it painted, and
    pointing at the picture ranks the words behind that patch. Maps are sharp: of the decoder's finest level, in the
    second half of the way, where patches and what they draw on agree. With --plain, --per, --sites or --animation
    everything shows plain shares of attention instead, BOS left out.

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
    """Plain maps of the attention sites of this pattern, such as "up_blocks.*"."""
    plain: bool = False
    """Plain maps: a mean over every site that sees words and every step."""
    animation: bool = False
    """Also an animation over the steps (WebP)."""
    json: Path | None = None
    """Write each word's mean and greatest value here, and where that is; and how much attention went to BOS, the text,
    EOS and padding."""
    npz: Path | None = None
    """Write the maps here: "words", their "maps" [words, height, width], sharp or plain, and each traced site's shares
    under its name, [steps, heads, patches, tokens] or for attn1 [steps, heads, patches, patches]."""

    @property
    def sharp(self) -> bool:
        """Whether maps are sharp ones; what shows parts of attention shows them as they are."""
        return not (self.plain or self.per or self.sites or self.animation)


def run(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(Look, "look", arguments)
    prompt, settings = what_to_paint(options)
    needed = {name: settings.pop(name) for name in NEEDED if name in settings}
    pipeline = options.open()
    if is_picture(options.source):
        refuse_others(needed, pipeline, Path(options.source))
    size = pipeline.latent_size(settings.get("height"), settings.get("width"))
    require_sense(options, pipeline, prompt, settings.get("weights", "a1111"), size)

    previews: list[Image.Image] = []
    result = paint(
        pipeline,
        [prompt],
        {**settings, "trace": trace_for(options, pipeline, size)},
        (lambda step: previews.append(step.preview())) if options.animation else (lambda step: None),
    )
    if is_picture(options.source):
        say_what_differs(Path(options.source), result.images[0])
    whole = result.heatmaps[0]
    heatmaps = whole.sharpened() if options.sharp else whole.select(sites="*attn2").without("bos")
    words: list[Word] = list(options.words or range(len(heatmaps.words)))
    stem = options.out / picture_name(result.settings[0])

    sheets = {f"{stem}-words.png": word_sheet(heatmaps, words)}
    if options.per is not None:
        sheets[f"{stem}-per-{options.per}.png"] = grid(heatmaps, words, options.per)
    if options.at is not None:
        print_words_at(heatmaps, *options.at)
        sheets[f"{stem}-at-{options.at[0]}-{options.at[1]}.png"] = whole.patches_for(*options.at).overlay(512)
    for file, sheet in sheets.items():
        save_picture(Path(file), sheet)
        print(file)
    write_text(Path(f"{stem}.html"), word_map_page(heatmaps))
    print(f"{stem}.html")
    if options.animation:
        frames = [
            word_sheet(replace(heatmaps.select(steps=[step]), picture=preview), words)
            for step, preview in enumerate(previews)
        ]
        save_animation(Path(f"{stem}.webp"), frames)
        print(f"{stem}.webp")
    where = {"shares": whole.shares(), "entropy": whole.entropy()}
    write_report(options.json, {**summary(heatmaps, words), **where, "settings": result.settings[0]})
    if options.npz is not None:
        write_npz(options.npz, whole, words, heatmaps.stack_words(words))


def is_picture(source: str) -> bool:
    """Whether a file is meant, and not a prompt."""
    return Path(source).suffix.lower() == ".png"


def what_to_paint(options: Look) -> tuple[str, dict[str, Any]]:
    """The prompt and its settings, as given or as a PNG says of itself."""
    if not is_picture(options.source):
        return options.source, options.settings()
    file = Path(options.source)
    if not file.is_file():
        raise UsageError(f"there is no picture at {file}: give a PNG that Gobelin painted, or a prompt")
    if given := [name for name, value in options.settings().items() if value is not None]:
        raise UsageError(f"{file} says itself how it was painted: leave out --{given[0].partition('_prompt')[0]}")
    settings = repeatable(read_png_settings(file), file, options.model)
    if "init_image" in settings:
        raise UsageError(f"{file} was painted over another picture, which it does not hold: look at a plain one")
    if lost := [name for name in ("prompt", "seed", "steps", "sampler", "guidance") if name not in settings]:
        raise DataError(f"{file}: its settings do not say the {lost[0]}, by which it could be painted again")
    return settings.pop("prompt"), settings


def require_sense(options: Look, pipeline: Pipeline, prompt: str, weights: Style, size: tuple[int, int]) -> None:
    """Refuse, before anything is painted, what could not be shown afterwards."""
    words = pipeline.words(prompt, weights)
    if not words.spans:
        raise UsageError(f"{prompt!r} has no word to look at: say in a few words what to paint")
    for word in options.words:
        words.tokens(word)
    cross = [site for site in pipeline.unet.attention_sites if site.kind == "cross"]
    choose_sites(cross, options.sites)
    height, width = (side * pipeline.vae.config.factor for side in size)
    if options.at is not None and not (0 <= options.at[0] < width and 0 <= options.at[1] < height):
        raise UsageError(f"the pixel {options.at[0]}, {options.at[1]} is not in the image of {width}×{height} pixels")


def trace_for(options: Look, pipeline: Pipeline, size: tuple[int, int]) -> Trace:
    """What to keep: what sees words, and where a pixel's patches are asked for what sees patches, if not too many."""
    if options.sharp:
        return sharp_trace(pipeline.unet.attention_sites, size)
    cross = [site for site in pipeline.unet.attention_sites if site.kind == "cross"]
    chosen = choose_sites(cross, options.sites)
    if options.at is not None:
        own = [site for site in pipeline.unet.attention_sites if site.kind == "self"]
        chosen += tuple(site for site in own if math.prod(site.grid(*size)) <= MOST_PATCHES)
    per_step = options.per == "step" or options.animation
    return Trace(sites=chosen, per_head=options.per == "head", per_step=per_step)


def say_what_differs(file: Path, painted: Image.Image) -> None:
    """Warn where a picture that was painted again is not the one in the file."""
    with Image.open(file) as before:
        if before.size != painted.size:
            raise DataError(f"{file} is {before.size} pixels, but its settings paint {painted.size}")
        most = int(np.asarray(ImageChops.difference(before.convert("RGB"), painted)).max())
    if most:
        print(
            f"gobelin: painted again, {file} differs by up to {most} of 255 levels: another model, precision, batch or "
            "machine made it, and the maps are of the new picture",
            file=sys.stderr,
        )


def print_words_at(heatmaps: HeatMaps, x: int, y: int) -> None:
    """The words behind a pixel, as a table."""
    table = Table("word", "share", title=f"Words behind the pixel at {x}, {y}")
    for span, share in heatmaps.words_at(x, y):
        table.add_row(span.word, f"{share:.1%}")
    Console().print(table)


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
    """Each word's mean and greatest value, and where that is."""
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
    return {"prompt": heatmaps.words.text, "words": rows}


def write_npz(file: Path, heatmaps: HeatMaps, words: Sequence[Word], maps: Tensor) -> None:
    """The words' ``maps`` as NumPy arrays, and what every site gave."""
    arrays: dict[str, Any] = {site.name: probs.cpu().numpy() for site, probs in heatmaps.maps.items()}
    arrays["words"] = np.array([heatmaps[word].label for word in words])
    arrays["maps"] = maps.cpu().numpy()
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


def _short(site: AttentionSite) -> str:
    """A site's name without what all have in common."""
    return site.name.replace(".transformer_blocks.0.attn2", "").replace(".attentions.", " ").replace("_blocks.", " ")
