"""``gobelin data``: scenes as a folder that any trainer reads, a look at a folder, and the state of the grader."""

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
from gobelin.data import FolderPairs, ScenePairs, find_world
from gobelin.data.image_folder import METADATA
from gobelin.errors import DataError, UsageError
from gobelin.formats.files import write_text
from gobelin.scenes import Calibration, calibrate
from gobelin.vae import VAE

ACTIONS = ("scenes", "check", "grader")

HELP = """usage: gobelin data scenes --out DIR [--count N --world NAME --seed N --split NAME]
       gobelin data check DIR [--json FILE]
       gobelin data grader [--world NAME --count N --vae MODEL --json FILE]

  scenes   write captioned scenes: PNG images, metadata.jsonl, and for each its scene and masks
  check    read a folder of captioned images, and say what can be used and what cannot, and why
  grader   measure how far the scenes' grader can be trusted, on pictures whose truth is known

examples:
  gobelin data scenes --out scenes --count 1000
  gobelin data check my-pictures
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
    """How many."""
    world: str = "core"
    """Which shapes, colours and captions there are: core, nano or rich."""
    seed: int = 0
    """Another seed, other scenes."""
    split: str = "train"
    """train, dev, test or heldout."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Read a folder of captioned images, and say what can be used and what cannot, and why.

    Some examples:
      gobelin data check my-pictures
    """

    folder: Positional[Path]
    """Images with metadata.jsonl, or with a .txt caption beside each."""
    json: Path | None = None
    """Write the findings here too."""


@dataclass(frozen=True, kw_only=True)
class Grader:
    """Measure how far the scenes' grader can be trusted, on pictures whose truth is known.

    True renders, blurred and noisy ones, and round trips through a VAE; blobs; swapped and shuffled prompts.

    Some examples:
      gobelin data grader --world core
      gobelin data grader --world nano --vae runs/mine
    """

    world: str = "core"
    """Which shapes, colours and captions there are: core, nano or rich."""
    count: int = 1000
    """Scenes of each category, and blobs of each kind."""
    vae: Path | None = None
    """A diffusers folder, of which the VAE is enough: each picture also goes through it and back."""
    json: Path | None = None
    """Write what was measured here too."""


def run(arguments: Sequence[str]) -> None:
    """The command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
    elif arguments[0] == "scenes":
        write_scenes(parse(Scenes, "data scenes", arguments[1:]))
    elif arguments[0] == "check":
        check(parse(Check, "data check", arguments[1:]))
    elif arguments[0] == "grader":
        grader(parse(Grader, "data grader", arguments[1:]))
    else:
        raise UsageError(f"unknown action {arguments[0]!r}: the choices are {', '.join(ACTIONS)}")


def write_scenes(options: Scenes) -> None:
    """Images first, the list that names them last."""
    pairs = ScenePairs(world=find_world(options.world), count=options.count, seed=options.seed, split=options.split)
    if options.out.exists() and any(options.out.iterdir()):
        raise DataError(f"{options.out} is not empty: choose another folder")
    (options.out / "masks").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(len(pairs)):
        sample = pairs.sample(index)
        name = f"{index:06d}.png"
        Image.fromarray(sample.image).save(options.out / name)
        # One picture of all masks: 0 is background, 1 the first object, and so on.
        numbers = np.arange(1, len(sample.masks) + 1, dtype=np.uint8)[:, None, None]
        Image.fromarray((sample.masks * numbers).max(axis=0).astype(np.uint8)).save(options.out / "masks" / name)
        words = [[word, list(things)] for word, things in sample.words]
        entry = {"file_name": name, "text": sample.caption, "scene": sample.scene.to_json(), "words": words}
        lines.append(json.dumps(entry, ensure_ascii=False))
    write_text(options.out / METADATA, "\n".join(lines) + "\n")
    print(f"{pairs.description}: {options.out}")


def check(options: Check) -> None:
    """Findings to the screen, and as JSON."""
    pairs = FolderPairs(options.folder)
    print(f"{len(pairs):,} pairs can be used, {len(pairs.skipped):,} were skipped")
    for skip in pairs.skipped:
        print(f"  {skip.name}: {skip.reason}")
    findings = {"pairs": len(pairs), "skipped": [vars(skip) for skip in pairs.skipped]}
    write_report(options.json, findings)


def grader(options: Grader) -> None:
    """A table to the screen, and as JSON."""
    world = find_world(options.world)
    if options.count < 1:
        raise UsageError(f"--count is {options.count}: give 1 or more")
    through = round_trip(VAE.from_pretrained(options.vae / "vae")) if options.vae else None
    with Console(stderr=True).status("grading") as status:
        measured = calibrate(world, options.count, through, advance=lambda part: status.update(f"grading: {part}"))
    print_calibration(measured)
    write_report(options.json, asdict(measured))


def round_trip(vae: VAE) -> Callable[[np.ndarray], np.ndarray]:
    """A function that sends a uint8 image [H, W, 3] through a VAE and back."""

    @torch.no_grad()
    def through(image: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(image).permute(2, 0, 1)[None].to(vae.device, vae.dtype) / 127.5 - 1
        decoded = vae.latents_to_images(vae.images_to_latents(images))[0].permute(1, 2, 0)
        return ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()

    return through


def print_calibration(measured: Calibration) -> None:
    """The tables: what each category is read right, and the rest."""
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
        ("blurred by so many pixels: read exactly", measured.blur_ladder),
        ("with so much noise: read exactly", measured.noise_ladder),
        ("blobs: called a shape", measured.blobs),
    ):
        table.add_row(name, "  ".join(f"{amount}: {share:.3f}" for amount, share in shares.items()))
    table.add_row("captions of other scenes: right", f"{measured.shuffled:.4f} (in truth {measured.chance:.4f})")
    table.add_row("time for a picture", f"{measured.milliseconds:.1f} ms")
    console.print(table)
