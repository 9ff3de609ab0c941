"""``gobelin data``: write scenes as an image folder, check one, encode one for training, calibrate the grader."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import Positional

from gobelin.cli.options import parse, write_report
from gobelin.data import SceneDataset, find_world
from gobelin.data.cache_use import measure_cache
from gobelin.data.cached_dataset import MAX_CACHED_BYTES
from gobelin.data.captioned_files import METADATA, legible
from gobelin.data.folder_report import FolderReport, report_folder
from gobelin.data.indexed_images import IndexedImages
from gobelin.data.webdataset import open_images
from gobelin.errors import DataError, UsageError
from gobelin.formats.files import write_text
from gobelin.formats.png import write_png
from gobelin.look.contact_sheet import Tile, TileRow, captioned_grid
from gobelin.scenes import Calibration, calibrate
from gobelin.training import find_preset
from gobelin.training.recipes.fine_tune import FineTune
from gobelin.vae import VAE

_MOST_SKIPPED = 50  # that are listed
_SHEET_IMAGES, _SHEET_COLUMNS = 48, 8
_ACTIONS = ("scenes", "check", "cache", "grader")

_HELP = """usage: gobelin data scenes --out DIR [--count N --world NAME --seed N --split NAME]
       gobelin data check PATH [--size N --buckets --fit crop|pad --caption-column NAME --sheet PNG --json FILE]
       gobelin data cache PATH --out DIR [--model MODEL --size N --buckets --flip]
       gobelin data grader [--world NAME --count N --vae MODEL --json FILE]

  scenes   write captioned scenes: PNG images, metadata.jsonl, and for each its scene and masks
  check    read captioned images, a folder or tars: sizes, captions, duplicates, and what cannot be used, and why
  cache    encode captioned images and their captions by a model, for gobelin train --data.cache DIR
  grader   calibrate the scenes' grader on images whose truth is known

examples:
  gobelin data scenes --out scenes --count 1000
  gobelin data check my-images
  gobelin data cache my-images --model model.safetensors --out cache
  gobelin data grader --world core
"""


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Write captioned scenes as a folder: images, metadata.jsonl, and each image's scene and masks.

    Some examples:
      gobelin data scenes --out scenes --count 1000
    """

    out: Path
    """The folder to write; it must be empty or new."""
    count: int = 1000
    """Number of scenes."""
    world: str = "core"
    """The shapes, colours and captions: core, nano or rich."""
    seed: int = 0
    """Another seed gives other scenes."""
    split: str = "train"
    """train, dev, test or heldout."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Read captioned images, a folder or tars: sizes, encodings, captions, duplicates; what is skipped, cropped, cut.

    Some examples:
      gobelin data check my-images
      gobelin data check my-images --size 128 --sheet sheet.png --json report.json
      gobelin data check shards --size 512 --buckets --index shards-index
    """

    folder: Positional[Path]
    """Images with metadata.jsonl, .csv or .parquet, or a .txt caption beside each; or tars of such images."""
    size: int = 64
    """Height and width in pixels that the images are to be trained at."""
    buckets: bool = False
    """Train each image at the nearest of several aspects, with no more pixels than the square."""
    fit: Literal["crop", "pad"] = "crop"
    """Crop what stands over on both sides, or pad what is missing with the background."""
    background: str = "white"
    """The colour behind transparent images and around padded ones."""
    index: Path | None = None
    """A folder that keeps what was found, so that unchanged images are not opened again."""
    caption_column: str | None = None
    """The column of the metadata, or the key of the JSON, with the captions; without it, text, caption or prompt."""
    vocab_size: int = 2048
    """Tokens of the tokenizer that is trained on the captions."""
    max_length: int = 32
    """Tokens of a caption that are learned."""
    sheet: Path | None = None
    """Draw images of the folder, as training sees them, with their captions into this PNG."""
    json: Path | None = None
    """Write the whole report to this file."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Compute what training from a model reads of captioned images: pixels, latents and text embeddings.

    What is in the folder already is not computed again; an interrupted command goes on. Nothing is removed. Training
    finds it where the model, the size and the other settings of the images are the same.

    Some examples:
      gobelin data cache my-images --model model.safetensors --out cache
      gobelin train --preset lora --model model.safetensors --data.path my-images --data.cache cache --out runs/style
    """

    folder: Positional[Path]
    """Images with metadata.jsonl, .csv or .parquet, or a .txt caption beside each; or tars of such images."""
    out: Path
    """The folder of the cache, which several runs and data sets may share."""
    model: str | None = None
    """Diffusers folder, .safetensors file, or Hub name; without it, the model that comes with Gobelin."""
    size: int | None = None
    """Height and width in pixels; without it, the model's own."""
    buckets: bool = False
    """Encode each image at the nearest of several aspects, with no more pixels than the square."""
    fit: Literal["crop", "pad"] = "crop"
    """Crop what stands over on both sides, or pad what is missing with the background."""
    background: str = "white"
    """The colour behind transparent images and around padded ones."""
    flip: bool = False
    """Encode mirrored images too."""
    caption_column: str | None = None
    """The column of the metadata, or the key of the JSON, with the captions; without it, text, caption or prompt."""
    device: str = "auto"
    """Device: auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class Grader:
    """Calibrate the scenes' grader on images whose truth is known.

    True renders, blurred and noisy ones, and round trips through a VAE; blobs; swapped and shuffled prompts.

    Some examples:
      gobelin data grader --world core
      gobelin data grader --world nano --vae runs/mine
    """

    world: str = "core"
    """The shapes, colours and captions: core, nano or rich."""
    count: int = 1000
    """Scenes of each category, and blobs of each kind."""
    vae: Path | None = None
    """A diffusers folder, or one with its VAE alone: each image is also encoded and decoded by it."""
    json: Path | None = None
    """Write the measurements to this file too."""


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin data``."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
    elif arguments[0] == "scenes":
        _write_scenes(parse(Scenes, "data scenes", arguments[1:]))
    elif arguments[0] == "check":
        _check(parse(Check, "data check", arguments[1:]))
    elif arguments[0] == "cache":
        _cache(parse(Cache, "data cache", arguments[1:]))
    elif arguments[0] == "grader":
        _grader(parse(Grader, "data grader", arguments[1:]))
    else:
        raise UsageError(f"unknown action {arguments[0]!r}: the choices are {', '.join(_ACTIONS)}")


def _write_scenes(options: Scenes) -> None:
    """Write the images first, and the metadata that names them last."""
    dataset = SceneDataset(world=find_world(options.world), count=options.count, seed=options.seed, split=options.split)
    if options.out.exists() and any(options.out.iterdir()):
        raise DataError(f"{options.out} is not empty: choose another folder")
    (options.out / "masks").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        name = f"{index:06d}.png"
        Image.fromarray(sample.image).save(options.out / name)
        # One image of all masks: 0 is background, 1 the first object, and so on.
        numbers = np.arange(1, len(sample.masks) + 1, dtype=np.uint8)[:, None, None]
        Image.fromarray((sample.masks * numbers).max(axis=0).astype(np.uint8)).save(options.out / "masks" / name)
        words = [[word, list(things)] for word, things in sample.words]
        entry = {
            "file_name": name,
            "mask_file_name": f"masks/{name}",
            "text": sample.caption,
            "scene": sample.scene.to_json(),
            "words": words,
        }
        lines.append(json.dumps(entry, ensure_ascii=False))
    write_text(options.out / METADATA, "\n".join(lines) + "\n")
    print(f"{dataset.description}: {options.out}")


def _check(options: Check) -> None:
    """Print the report, draw the sheet, and write the report as JSON."""
    if options.size < 1:
        raise UsageError(f"--size is {options.size}: give 1 pixel or more")
    if options.max_length < 3:
        raise UsageError(f"--max-length is {options.max_length}: give 3 tokens or more")
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("opening images")
        dataset = open_images(
            options.folder,
            options.size,
            options.caption_column,
            advance=lambda done, total: progress.update(task, completed=done, total=total),
            index=options.index,
            buckets=options.buckets,
            fit=options.fit,
            background=options.background,
        )
        task = progress.add_task("looking at them")
        report = report_folder(
            dataset,
            options.vocab_size,
            options.max_length,
            advance=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for line in report.lines():
        print(line)
    for skip in report.skipped[:_MOST_SKIPPED]:
        print(f"  {legible(skip.name)}: {legible(skip.reason)}")
    if len(report.skipped) > _MOST_SKIPPED:
        print(f"  and {len(report.skipped) - _MOST_SKIPPED:,} more: --json lists them")
    if options.sheet is not None:
        write_png(options.sheet, _folder_sheet(dataset, report))
        print(options.sheet)
    write_report(options.json, report.json())


def _folder_sheet(dataset: IndexedImages, report: FolderReport) -> Image.Image:
    """Draw images from all over the folder as training sees them, and those that are enlarged or cropped."""
    names = [legible(name) for name in dataset.names]
    chosen = range(0, len(names), -(-len(names) // _SHEET_IMAGES))
    rows: list[tuple[str, Sequence[int]]] = [("", chosen)]
    for label, some in (("enlarged", report.enlarged), ("cropped", report.cropped)):
        if some:
            rows.append((label, [names.index(name) for name in some[:_SHEET_COLUMNS]]))
    tiles = [
        TileRow(
            label=label,
            tiles=[
                Tile(image=Image.fromarray(entry.image), caption=entry.caption)
                for entry in map(dataset.__getitem__, indices)
            ],
        )
        for label, indices in rows
    ]
    title = f"{report.images:,} captioned images in {legible(dataset.source.name or str(dataset.source))}"
    return captioned_grid(tiles, columns=_SHEET_COLUMNS, side=max(96, dataset.size), title=title)


def _cache(options: Cache) -> None:
    """Compute what is missing, and print for each kind how much was there, and what is left of other models."""
    if options.out.exists() and not options.out.is_dir():
        raise DataError(f"{options.out} is a file: give a folder for the cache")
    preset = find_preset("finetune")
    names = ("size", "buckets", "fit", "background", "flip", "caption_column")
    given = {name: getattr(options, name) for name in names}
    data = replace(preset.data, path=str(options.folder), cache=str(options.out), validation=0, **given)
    config = replace(preset, model=options.model, device=options.device, data=data)
    before = measure_cache(options.out)
    dataset, latents, texts = FineTune(config, options.out, False, Console(stderr=True)).fill_cache()
    after = measure_cache(options.out)
    images = len(set(dataset.dataset.hashes))
    captions = {text for index in range(len(dataset)) for text in dataset.captions(index)} | {""}
    kinds = (
        ("pixels", dataset.folder, images),
        ("latents", latents.folder, images * (1 + options.flip)),
        ("text embeddings", texts.folder, len(captions)),
    )
    for kind, folder, count in kinds:
        if folder is None:
            print(f"{kind}: not kept, as they take more than {MAX_CACHED_BYTES // 2**30} GiB")
            continue
        rows = before[folder.name].rows if folder.name in before else 0
        computed = min(count, after[folder.name].rows - rows)
        print(
            f"{kind}: {count - computed:,} there, {computed:,} computed, {_megabytes(after[folder.name].bytes)} in all"
        )
    used = [folder.name for _, folder, _ in kinds if folder is not None]
    others = [use.bytes for name, use in after.items() if name not in used]
    if others:
        left = f"{len(others)} folder{'s' * (len(others) > 1)}, {_megabytes(sum(others))}"
        print(f"of other models, sizes or settings: {left}; nothing is removed")
    print(options.out)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _grader(options: Grader) -> None:
    """Print a table of measurements, and write them as JSON."""
    world = find_world(options.world)
    if options.count < 1:
        raise UsageError(f"--count is {options.count}: give 1 or more")
    through = _round_trip(VAE.from_pretrained(options.vae / "vae")) if options.vae else None
    with Console(stderr=True).status("grading") as status:
        measured = calibrate(world, options.count, through, advance=lambda part: status.update(f"grading: {part}"))
    _print_calibration(measured)
    write_report(options.json, asdict(measured))


def _round_trip(vae: VAE) -> Callable[[np.ndarray], np.ndarray]:
    """Make a function that encodes and decodes a uint8 image [H, W, 3] with a VAE."""

    @torch.no_grad()
    def through(image: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(image).permute(2, 0, 1)[None].to(vae.device, vae.dtype) / 127.5 - 1
        decoded = vae.latents_to_images(vae.images_to_latents(images))[0].permute(1, 2, 0)
        return ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()

    return through


def _print_calibration(measured: Calibration) -> None:
    """Print two tables: shares of scenes read exactly by category, then the other measurements."""
    console = Console(width=120)
    columns = {
        "true renders": measured.renders,
        "blur 0.7 px": measured.blurred,
        "noise 0.02": measured.noisy,
        "VAE round trip": measured.round_trips,
        "parts swapped": measured.swapped,
    }
    columns = {name: shares for name, shares in columns.items() if shares}
    table = Table("scenes", *columns, title=f"World {measured.world}: scenes read exactly, {measured.count:,} each")
    for category in measured.renders:
        shares = (shares.get(category) for shares in columns.values())
        table.add_row(category, *("–" if share is None else f"{share:.4f}" for share in shares))
    console.print(table)
    table = Table("measure", "amount: share")
    for name, shares in (
        ("blurred by a Gaussian, σ in pixels: read exactly", measured.blur_ladder),
        ("noise added, σ: read exactly", measured.noise_ladder),
        ("blobs: called a shape", measured.blobs),
    ):
        table.add_row(name, "  ".join(f"{amount}: {share:.3f}" for amount, share in shares.items()))
    table.add_row("captions of other scenes: graded right", f"{measured.shuffled:.4f} (in truth {measured.chance:.4f})")
    table.add_row("time for an image", f"{measured.milliseconds:.1f} ms")
    console.print(table)
