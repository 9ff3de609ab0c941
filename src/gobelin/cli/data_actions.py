"""The work of ``gobelin data``: one function an action."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gobelin.cli.data import Cache, Check, Emoji, Grader, Scenes
from gobelin.cli.options import write_report
from gobelin.data import SceneDataset, find_world
from gobelin.data.cache_use import measure_cache
from gobelin.data.cached_dataset import MAX_CACHED_BYTES
from gobelin.data.captioned_files import METADATA, legible
from gobelin.data.emoji import HELD_OUT, STYLES, TRAIN, EmojiPackages, write_emoji
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
_LARGEST_EMOJI = 1024  # pixels


def write_scenes(options: Scenes) -> None:
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


def write_emoji_images(options: Emoji) -> None:
    """Draw the pictures of all concepts, and say how many there are."""
    if not 16 <= options.size <= _LARGEST_EMOJI:
        raise UsageError(f"--size is {options.size}: give 16 to {_LARGEST_EMOJI} pixels")
    packages = EmojiPackages(options.packages, options.styles or tuple(STYLES))
    counts = write_emoji(packages, options.out, options.size)
    print(
        f"{counts[TRAIN]:,} images of {counts['concepts']:,} concepts in {options.out / TRAIN}, "
        f"{counts[HELD_OUT]:,} held out in {options.out / HELD_OUT}"
    )


def check_images(options: Check) -> None:
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


def encode_images(options: Cache) -> None:
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


def calibrate_grader(options: Grader) -> None:
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
