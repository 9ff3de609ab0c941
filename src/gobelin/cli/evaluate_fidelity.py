"""The work of ``gobelin evaluate fidelity``: painted images compared with true ones by FID, KID and CLIP score."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import Progress

from gobelin.checkpoint.shipped import find_model
from gobelin.cli.evaluate_options import EvaluateFidelity
from gobelin.cli.open_and_paint import open_pipeline
from gobelin.cli.painting_options import PipelineOptions
from gobelin.cli.report_files import progress_bar, publish
from gobelin.clip import IMAGE_ENCODER
from gobelin.data.indexed_images import IndexedImages
from gobelin.data.webdataset import open_images
from gobelin.errors import DataError, UsageError
from gobelin.evaluate.fidelity import fidelity_report, measure_fidelity
from gobelin.evaluate.image_features import (
    INCEPTION,
    ImageFeatures,
    SharedSpace,
    open_image_features,
    require_package,
)
from gobelin.evaluate.image_sets import (
    FEWEST_IMAGES,
    MOST_IMAGES,
    ImageSet,
    common_side,
    paint_captions,
    painted_size,
    require_empty,
    shuffled_rows,
    write_captions,
)
from gobelin.formats.files import share_files
from gobelin.pipeline import find_device
from gobelin.settings import Settings

_MODEL, _NONE = "model", "none"
_SETTINGS = ("sampler", "steps", "guidance")
_PIPELINE = {field.name for field in dataclasses.fields(PipelineOptions)} - {"device"}


def evaluate_fidelity(options: EvaluateFidelity) -> None:
    """Paint images or read them, compare them, and print and write what came of it."""
    _refuse_mistakes(options)
    require_package("torchmetrics")
    folder = _open(options.folder, options.caption_column, require_captions=options.painted is None)
    order = shuffled_rows(folder, options.seed, 2 * FEWEST_IMAGES if options.painted is None else FEWEST_IMAGES)
    side = _paint(options, folder, order) if options.painted is None else _read(options, options.painted)
    true, others = _true_sides(options, folder, order, side)
    device = find_device(options.device)
    source = _encoder_folder(options) if options.features == _MODEL else options.features
    features = open_image_features(source, device)
    clip = _open_clip(options, features, device, side.captions is not None)
    if options.out is not None and side.captions is not None:
        write_captions(options.out, side.captions)
    with progress_bar("comparing", side.count + len(true) + len(others or ())) as advance:
        content = measure_fidelity(
            side.name,
            true,
            side.images,
            features,
            captions=side.captions,
            clip=clip,
            others=others,
            settings=side.settings,
            seed=options.seed,
            advance=advance,
        ).to_json()
    publish(options, content, fidelity_report(content))


@dataclass(frozen=True, kw_only=True)
class _Side:
    """Painted images, read or painted as they are asked for, and what is said of them."""

    name: str
    images: Iterable[UInt8[np.ndarray, "height width 3"]]
    count: int
    size: int
    captions: list[str] | None
    settings: dict[str, Any]


def _read(options: EvaluateFidelity, folder: Path) -> _Side:
    """Read images that are painted already."""
    found = _open(folder, None, require_captions=False)
    order = shuffled_rows(found, options.seed)
    _refuse_more(options, found, len(order))
    rows = sorted(order[: options.count or MOST_IMAGES])  # in the order in which --out wrote them: the same KID
    images = ImageSet(found, rows, common_side(found))
    return _Side(
        name=folder.resolve().name,
        images=images,
        count=len(images),
        size=images.size,
        captions=images.captions,
        settings={"seed": options.seed},
    )


def _paint(options: EvaluateFidelity, folder: IndexedImages, order: Sequence[int]) -> _Side:
    """Open the model, and paint images when they are asked for: of the captions of the first rows, half at most."""
    half = len(order) // 2
    _refuse_more(options, folder, half)
    pipeline = open_pipeline(options)
    size = painted_size(pipeline)
    captions = ImageSet(folder, order[: options.count or min(half, MOST_IMAGES)], size).captions
    assert captions is not None, "images without a caption were left out"
    given = {key: getattr(options, key) for key in _SETTINGS}
    settings = {key: getattr(pipeline.recommended, key) if value is None else value for key, value in given.items()}
    return _Side(
        name=pipeline.name,
        images=paint_captions(pipeline, captions, options.seed, given, options.out),
        count=len(captions),
        size=size,
        captions=captions,
        settings={**settings, "seed": options.seed, "dtype": options.dtype},
    )


def _true_sides(
    options: EvaluateFidelity, folder: IndexedImages, order: Sequence[int], side: _Side
) -> tuple[ImageSet, ImageSet | None]:
    """Choose the true images, and as many others: the first rows, of whose captions is painted, are the others.

    Beside images that are painted already, a folder may have too few for both: then there are no others.
    """
    if 2 * side.count <= len(order):
        rows = order[side.count : 2 * side.count], order[: side.count]
        return ImageSet(folder, rows[0], side.size), ImageSet(folder, rows[1], side.size)
    _refuse_more(options, folder, len(order))
    return ImageSet(folder, order[: side.count], side.size), None


def _refuse_more(options: EvaluateFidelity, images: IndexedImages, most: int) -> None:
    """Raise :class:`UsageError` for a ``--count`` of more images than a side can have."""
    if options.count is not None and options.count > most:
        half = "" if most == len(images) else ", half to paint their captions and half to compare with"
        raise UsageError(
            f"--count is {options.count:,}: {images.source} has {len(images):,} images that can be used{half}; give "
            f"{most:,} or fewer"
        )


def _refuse_mistakes(options: EvaluateFidelity) -> None:
    """Raise :class:`UsageError` for options that make no sense alone or together, before anything is read."""
    Settings(seed=options.seed, **{name: getattr(options, name) for name in _SETTINGS})
    if options.out is not None:
        require_empty(options.out)
    if options.count is not None and options.count < FEWEST_IMAGES:
        raise UsageError(f"--count is {options.count}: give {FEWEST_IMAGES} or more")
    if options.lora_dir is not None:
        raise UsageError(
            "--lora-dir is for prompts that ask for LoRAs, and captions are painted as they are: give --lora"
        )
    if options.clip == INCEPTION:
        raise _reads_no_captions(options.clip)
    for option, other in (("--painted", options.painted), ("--out", options.out)):
        if other is not None and share_files(options.folder, other):
            raise UsageError(
                f"the true images are in {options.folder} and {option} is {other}: give folders apart from each other"
            )
    if options.painted is None:
        return
    for field in dataclasses.fields(options):
        paints = field.name in (*_SETTINGS, "out") or field.name in _PIPELINE
        if paints and getattr(options, field.name) != field.default:
            raise UsageError(
                f"--{field.name.replace('_', '-')} is for painting, and --painted has painted images: leave out one"
            )
    for option, value in (("--features", options.features), ("--clip", options.clip)):
        if value == _MODEL:
            raise UsageError(f"{option} is model, and --painted comes with none: give the model's folder as {option}")


def _open(folder: Path, caption_column: str | None, require_captions: bool) -> IndexedImages:
    """Open a folder of images, with a progress bar."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(f"reading {folder}", total=None)
        return open_images(
            folder,
            caption_column=caption_column,
            require_captions=require_captions,
            advance=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _encoder_folder(options: EvaluateFidelity) -> Path:
    """Find the folder of the model that paints; raises :class:`UsageError` where it has no image encoder."""
    folder = find_model(options.model)
    if not (folder / IMAGE_ENCODER).is_dir():
        raise UsageError(
            f"the model {folder} has no {IMAGE_ENCODER}, as models have that were trained from scratch: give the "
            "folder of one, or of a CLIP"
        )
    return folder


def _open_clip(
    options: EvaluateFidelity, features: ImageFeatures, device: torch.device, has_captions: bool
) -> SharedSpace | None:
    """Open what compares images with captions; says on standard error why there is no CLIP score."""
    source: str | Path | None = options.clip
    if source is None and not isinstance(features, SharedSpace) and options.painted is None:
        own = find_model(options.model)
        source = own if (own / IMAGE_ENCODER).is_dir() else None
    if source == _NONE:
        return None
    if not has_captions:
        reason = f"{options.painted} has images without a caption"
        if options.clip is not None:
            raise DataError(f"{reason}, which --clip needs: add them, as metadata.jsonl, or leave out --clip")
        print(f"gobelin: no CLIP score, as {reason}", file=sys.stderr)
        return None
    if source is None and isinstance(features, SharedSpace):
        return features
    if source is None:
        print("gobelin: no CLIP score: give the folder of a CLIP, or of a model, as --clip", file=sys.stderr)
        return None
    if source != options.features:
        features = open_image_features(_encoder_folder(options) if source == _MODEL else source, device)
    if not isinstance(features, SharedSpace):
        raise _reads_no_captions(source)
    return features


def _reads_no_captions(source: str | Path) -> UsageError:
    return UsageError(f"--clip is {source}, which reads no captions: give model, or the folder of a model or CLIP")
