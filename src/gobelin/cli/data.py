"""``gobelin data``: write scenes as an image folder, check an image folder, calibrate the scenes' grader."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from gobelin.cli.options import parse, write_report
from gobelin.data import ImageFolderDataset, SceneDataset, find_world
from gobelin.data.image_folder import METADATA
from gobelin.errors import DataError, UsageError
from gobelin.formats.files import write_text
from gobelin.scenes import Calibration, calibrate
from gobelin.vae import VAE

_ACTIONS = ("scenes", "check", "grader")

_HELP = """usage: gobelin data scenes --out DIR [--count N --world NAME --seed N --split NAME]
       gobelin data check DIR [--json FILE]
       gobelin data grader [--world NAME --count N --vae MODEL --json FILE]

  scenes   write captioned scenes: PNG images, metadata.jsonl, and for each its scene and masks
  check    read a folder of captioned images, and list those that cannot be used, and why
  grader   calibrate the scenes' grader on images whose truth is known

examples:
  gobelin data scenes --out scenes --count 1000
  gobelin data check my-images
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
    """Read a folder of captioned images, and list those that cannot be used, and why.

    Some examples:
      gobelin data check my-images
    """

    folder: Positional[Path]
    """Images with metadata.jsonl, or with a .txt caption beside each."""
    json: Path | None = None
    """Write the findings to this file too."""


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
        entry = {"file_name": name, "text": sample.caption, "scene": sample.scene.to_json(), "words": words}
        lines.append(json.dumps(entry, ensure_ascii=False))
    write_text(options.out / METADATA, "\n".join(lines) + "\n")
    print(f"{dataset.description}: {options.out}")


def _check(options: Check) -> None:
    """Print the findings, and write them as JSON."""
    dataset = ImageFolderDataset(options.folder)
    print(f"{len(dataset):,} captioned images can be used, {len(dataset.skipped):,} skipped")
    for skip in dataset.skipped:
        print(f"  {skip.name}: {skip.reason}")
    findings = {"images": len(dataset), "skipped": [vars(skip) for skip in dataset.skipped]}
    write_report(options.json, findings)


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
