"""``gobelin data``: scenes written as a folder that any trainer reads, and a look at a folder before training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tyro.conf import Positional

from gobelin.cli.options import parse, write_report
from gobelin.data import FolderPairs, ScenePairs, find_world
from gobelin.data.folder import METADATA
from gobelin.errors import DataError, UsageError
from gobelin.formats.files import write_text

ACTIONS = ("scenes", "check")

HELP = """usage: gobelin data scenes --out DIR [--count N --world NAME --seed N --split NAME]
       gobelin data check DIR [--json FILE]

  scenes   write captioned scenes: PNG images, metadata.jsonl, and for each its scene and masks
  check    read a folder of captioned images, and say what can be used and what cannot, and why

examples:
  gobelin data scenes --out scenes --count 1000
  gobelin data check my-pictures
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
    """Which shapes, colours and captions there are: core or nano."""
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


def run(arguments: Sequence[str]) -> None:
    """The command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
    elif arguments[0] == "scenes":
        write_scenes(parse(Scenes, "data scenes", arguments[1:]))
    elif arguments[0] == "check":
        check(parse(Check, "data check", arguments[1:]))
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
