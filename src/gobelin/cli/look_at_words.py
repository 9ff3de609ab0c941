"""The work of ``gobelin look``: painting with maps; sheets, pages and numbers of them."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops
from rich.console import Console
from rich.table import Table

from gobelin.attention import AttentionSite, Trace, choose_sites
from gobelin.captioned_images import LOOK_TIMESTEPS, fitted_size
from gobelin.cli.look import Look
from gobelin.cli.open_and_paint import (
    ADDED,
    open_pipeline,
    paint_with_progress,
    refuse_other_additions,
    settings_of_image,
)
from gobelin.cli.options import write_report
from gobelin.errors import DataError, UsageError
from gobelin.formats.files import replacing, write_text
from gobelin.formats.png import read_png_settings, write_png
from gobelin.images import open_image
from gobelin.look.heatmaps import HeatMap, HeatMaps
from gobelin.look.mask_files import coco_annotations, mask_image, word_masks
from gobelin.look.page import word_map_page
from gobelin.look.sharp_maps import MOST_PATCHES
from gobelin.look.word_sheets import grid_sheet, save_animation, word_sheet
from gobelin.painting import file_slug
from gobelin.pipeline import Pipeline
from gobelin.settings import Settings
from gobelin.words import TokenKind, Word, list_words

MOST_COLUMNS = 12  # steps in a sheet: more are too small to see
_OTHER_IMAGES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
_PARTS: tuple[TokenKind, ...] = ("bos", "eos", "padding")
_FOR_CAPTIONED = ("seed", "height", "width", "weights", "clip_skip")


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """An image with its maps; ``stem`` is the path of what is written without its suffix.

    ``previews`` are of each step, where an animation is made of them; ``steps`` name the steps that were kept apart.
    """

    heatmaps: HeatMaps
    stem: Path
    settings: dict[str, Any]
    steps: list[str]
    previews: list[Image.Image]


def look_at_words(options: Look) -> None:
    """Paint, or look at an image, and write sheets and a page; print where they are."""
    looked = _painted(options) if options.caption is None else _captioned(options, options.caption)
    whole, stem = looked.heatmaps, looked.stem
    asked = [word.lower() for word in options.words]
    parts: list[TokenKind] = [part for part in _PARTS if part in asked and not whole.words.has(part)]
    heatmaps = whole if options.sharp else whole.select(sites="*attn2")
    if not options.sharp and "bos" not in parts:
        heatmaps = heatmaps.without("bos")
    words: list[Word] = list(options.words or range(len(heatmaps.words)))

    sheets = {f"{stem}-words.png": word_sheet(heatmaps, words)}
    if options.per is not None:
        sheets[f"{stem}-per-{options.per}.png"] = _per_sheet(heatmaps, words, options.per, looked.steps)
    if options.at is not None:
        _print_words_at(heatmaps, *options.at)
        sheets[f"{stem}-at-{options.at[0]}-{options.at[1]}.png"] = whole.patches_for(*options.at).overlay(512)
    for file, sheet in sheets.items():
        write_png(Path(file), sheet)
        print(file)
    write_text(Path(f"{stem}.html"), word_map_page(heatmaps, parts=parts))
    print(f"{stem}.html")
    if options.animation:
        frames = [
            word_sheet(replace(heatmaps.select(steps=[step]), image=preview), words)
            for step, preview in enumerate(looked.previews)
        ]
        save_animation(Path(f"{stem}.webp"), frames)
        print(f"{stem}.webp")
    if options.masks is not None:
        _write_masks(heatmaps, words, options.masks, stem)
    where = {"shares": whole.shares(), "entropy": whole.entropy()}
    write_report(options.json, {**_summary(heatmaps, words), **where, "settings": looked.settings})
    if options.npz is not None:
        _write_npz(options.npz, whole, heatmaps, words, options.masks)
    for file in filter(None, (options.json, options.npz)):
        print(file)


def _painted(options: Look) -> _Looked:
    """Paint a prompt, or an image of Gobelin's again."""
    if options.timesteps:
        raise UsageError("--timesteps are for an image with a --caption: give one, or leave them out")
    prompt, settings, needed = _to_paint(options)
    (prompt,), tags = options.take_tags([prompt], settings.get("weights"))
    pipeline = open_pipeline(options, tags)
    if needed is not None:
        refuse_other_additions(needed, pipeline, Path(options.source))
    checked = Settings(**settings)
    filled = checked.filled(pipeline.recommended)
    size = pipeline.latent_size(filled.height, filled.width)
    _refuse_what_cannot_be_shown(options, pipeline, prompt, filled, size)
    trace = replace(_trace(options, pipeline, size), negative=bool(filled.negative_prompt))

    previews: list[Image.Image] = []
    result = paint_with_progress(
        pipeline,
        [prompt],
        replace(checked, trace=trace),
        (lambda step: previews.append(step.preview())) if options.animation else (lambda step: None),
    )
    if _is_image(options.source):
        _say_what_differs(Path(options.source), result.images[0])
    if _is_image(options.source):  # which is there already
        stem = options.out / Path(options.source).stem
    else:
        (image,) = result.save(options.out)
        stem = image.with_suffix("")
        print(image)
    return _Looked(
        heatmaps=result.heatmaps[0],
        stem=stem,
        settings=result.settings[0],
        steps=[f"step {step + 1}" for step in range(result.heatmaps[0].steps)],
        previews=previews,
    )


def _captioned(options: Look, caption: str) -> _Looked:
    """Look at an image that anybody made."""
    if not Path(options.source).is_file():
        raise UsageError(f"there is no image at {options.source}: --caption says what an image shows")
    if options.animation:
        raise UsageError("an animation is of the steps of painting: leave out --animation, or --caption")
    for name in options.settings:
        if name not in _FOR_CAPTIONED:
            raise UsageError(f"--{name.replace('_', '-')} is for painting, and this image is there: leave it out")
    (text,), tags = options.take_tags([caption], options.settings.get("weights"))
    pipeline = open_pipeline(options, tags)
    image = open_image(options.source)
    given = Settings(**options.settings)
    height, width = fitted_size(pipeline.model, image.size, given.height, given.width)
    size = pipeline.latent_size(height, width)
    _refuse_what_cannot_be_shown(options, pipeline, text, given, size)
    timesteps = options.timesteps or LOOK_TIMESTEPS
    (heatmaps,) = pipeline.look(
        image, text, timesteps=timesteps, trace=_trace(options, pipeline, size), **options.settings
    )
    stem = options.out / f"{Path(options.source).stem}-looked-at"  # which is no name of the image itself
    write_png(stem.with_name(f"{stem.name}.png"), heatmaps.image)
    print(f"{stem}.png")
    return _Looked(
        heatmaps=heatmaps,
        stem=stem,
        settings={"caption": text, "timesteps": list(timesteps), **options.settings, "model": pipeline.name},
        steps=[f"timestep {timestep}" for timestep in timesteps],
        previews=[],
    )


def _is_image(source: str) -> bool:
    """Tell a file from a prompt; raises :class:`UsageError` for an image that is no PNG."""
    suffix = Path(source).suffix.lower()
    if suffix in _OTHER_IMAGES and " " not in Path(source).name.strip():
        raise UsageError(f"{source} is no PNG that Gobelin painted: say what it shows by --caption")
    return suffix == ".png"


def _to_paint(options: Look) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Return the prompt and its settings, as given or as a PNG says of itself, and what that needs loaded."""
    given = options.settings
    if not _is_image(options.source):
        for name in ("init_image", "count"):
            if name in given:
                raise UsageError(f"gobelin look paints one image from noise: leave out --{name.replace('_', '-')}")
        return options.source, given, None
    file = Path(options.source)
    if not file.is_file():
        raise UsageError(f"there is no image at {file}: give a PNG that Gobelin painted, or a prompt")
    if given:
        raise UsageError(f"{file} says itself how it was painted: leave out --{next(iter(given)).replace('_', '-')}")
    try:
        recorded = read_png_settings(file)
    except DataError as error:
        raise DataError(f"{error}, or say what it shows by --caption") from error
    settings = settings_of_image(recorded, file, options.model)
    if "init_image" in settings:
        raise UsageError(f"{file} was painted over another image, which it does not hold: look at a plain one")
    if lost := [name for name in ("prompt", "seed", "steps", "sampler", "guidance") if name not in settings]:
        raise DataError(f"{file}: its settings do not say the {lost[0]}, by which it could be painted again")
    needed = {name: settings.pop(name) for name in ADDED if name in settings}
    return settings.pop("prompt"), settings, needed


def _refuse_what_cannot_be_shown(
    options: Look, pipeline: Pipeline, prompt: str, settings: Settings, size: tuple[int, int]
) -> None:
    """Raise :class:`UsageError`, before anything is painted, for what could not be shown afterwards."""
    words = pipeline.words(prompt, settings.weights or "a1111")
    if not words.spans:
        raise UsageError(f"{prompt!r} has no word to look at: say in a few words what to paint")
    beside = list_words(options.also, [1] * len(options.also))
    for word in options.words:
        if word.lower() not in _PARTS and not beside.has(word):
            words.tokens(word)
    cross = [site for site in pipeline.unet.attention_sites if site.kind == "cross"]
    choose_sites(cross, options.sites)
    height, width = (side * pipeline.vae.config.factor for side in size)
    if options.at is not None and not (0 <= options.at[0] < width and 0 <= options.at[1] < height):
        raise UsageError(f"the pixel {options.at[0]}, {options.at[1]} is not in the image of {width}×{height} pixels")


def _trace(options: Look, pipeline: Pipeline, size: tuple[int, int]) -> Trace:
    """Choose the attention to keep: cross-attention and, for a pixel's patches, self-attention of small maps."""
    if options.sharp:
        return Trace(sharp=True, also=options.also)
    cross = [site for site in pipeline.unet.attention_sites if site.kind == "cross"]
    chosen = choose_sites(cross, options.sites)
    if options.at is not None:
        own = [site for site in pipeline.unet.attention_sites if site.kind == "self"]
        chosen += tuple(site for site in own if math.prod(site.grid(*size)) <= MOST_PATCHES)
    per_step = options.per == "step" or options.animation
    return Trace(sites=chosen, per_head=options.per == "head", per_step=per_step, also=options.also)


def _say_what_differs(file: Path, painted: Image.Image) -> None:
    """Warn where an image that was painted again is not the one in the file."""
    with Image.open(file) as before:
        if before.size != painted.size:
            raise DataError(f"{file} is {before.size} pixels, but its settings paint {painted.size}")
        most = int(np.asarray(ImageChops.difference(before.convert("RGB"), painted)).max())
    if most:
        print(
            f"gobelin: painted again, {file} differs by up to {most} of 255 levels: another model, precision, batch or "
            "machine made it, and the maps are of the new image",
            file=sys.stderr,
        )


def _print_words_at(heatmaps: HeatMaps, x: int, y: int) -> None:
    """The words behind a pixel, as a table."""
    table = Table("word", "share", title=f"Words behind the pixel at {x}, {y}")
    for span, share in heatmaps.words_at(x, y):
        table.add_row(span.word, f"{share:.1%}")
    Console().print(table)


def _per_sheet(heatmaps: HeatMaps, words: Sequence[Word], per: str, steps: Sequence[str]) -> Image.Image:
    """A row a word, a column a step, a layer or a head."""
    parts: list[tuple[str, HeatMaps]] = []
    if per == "step":
        chosen = np.linspace(0, heatmaps.steps - 1, min(MOST_COLUMNS, heatmaps.steps)).round().astype(int).tolist()
        parts = [(steps[int(step)], heatmaps.select(steps=[step])) for step in chosen]
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


def _summary(heatmaps: HeatMaps, words: Sequence[Word]) -> dict[str, Any]:
    """Each word's mean and greatest value, and where that is; of words beside the prompt and of a negative one too."""
    summary: dict[str, Any] = {"prompt": heatmaps.words.text, "words": _rows(heatmaps, words)}
    for name, one in (("also", heatmaps.also_traced), ("negative", heatmaps.negative_traced)):
        if one is not None:
            summary[name] = _rows(one, range(len(one.words)))
    return summary


def _rows(heatmaps: HeatMaps, words: Sequence[Word]) -> list[dict[str, Any]]:
    rows = []
    for word in words:
        raw = heatmaps[word].raw
        row, column = divmod(int(raw.argmax()), raw.shape[1])
        rows.append(
            {
                "word": heatmaps[word].label,
                "tokens": list(heatmaps.words.tokens(word)) if heatmaps.words.has(word) else [],
                "mean": raw.mean().item(),
                "most": raw.max().item(),
                "most_at": [column, row],
            }
        )
    return rows


def _write_masks(heatmaps: HeatMaps, words: Sequence[Word], threshold: float, stem: Path) -> None:
    """Write a PNG for each word's mask, and COCO's JSON of all."""
    for number, (label, mask) in enumerate(word_masks(heatmaps, words, threshold)):
        file = Path(f"{stem}-mask-{number + 1}-{file_slug(label)}.png")
        write_png(file, mask_image(mask))
        print(file)
    file = Path(f"{stem}-coco.json")
    write_text(file, json.dumps(coco_annotations(heatmaps, words, threshold, f"{stem.name}.png"), ensure_ascii=False))
    print(file)


def _write_npz(file: Path, whole: HeatMaps, heatmaps: HeatMaps, words: Sequence[Word], threshold: float | None) -> None:
    """Write the words' maps in all directions as NumPy arrays, and what every site gave."""
    arrays: dict[str, Any] = {site.name: probs.numpy() for site, probs in whole.maps.items()}
    found = heatmaps.arrays(words)
    arrays |= {"words": np.array(found.words), "words_to_image": found.words_to_image}
    arrays["image_to_words"] = found.image_to_words
    if (patches := whole.arrays([]).patches_to_patches) is not None:
        arrays["patches_to_patches"] = patches
    if threshold is not None:
        arrays["masks"] = heatmaps.masks(words, threshold).numpy()
    for name, one in (("also", heatmaps.also_traced), ("negative", heatmaps.negative_traced)):
        if one is not None:
            beside = one.arrays()
            arrays |= {name: np.array(beside.words), f"{name}_to_image": beside.words_to_image}
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


def _short(site: AttentionSite) -> str:
    """A site's name without what all have in common."""
    return site.name.replace(".transformer_blocks.0.attn2", "").replace(".attentions.", " ").replace("_blocks.", " ")
