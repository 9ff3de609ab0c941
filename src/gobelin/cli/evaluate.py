"""``gobelin evaluate``: a model's scores, with their intervals and with the state of the instruments."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import Positional

from gobelin.cli.options import parse, write_report
from gobelin.data import find_world
from gobelin.errors import UsageError
from gobelin.evaluate.faithfulness import (
    Instruments,
    TaskScore,
    chance,
    check_instruments,
    contact_sheet,
    report,
    score,
    shuffled,
)
from gobelin.formats.files import replacing
from gobelin.pipeline import Pipeline
from gobelin.scenes import PROMPT_SPLITS, TASKS

SHEET_SUFFIXES = (".png", ".jpg")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure how faithfully a model of the scenes paints what it is told.

    Prompts of a fixed list are painted, and each picture is graded without a look at its prompt. Shares come with
    95 % intervals. The same pictures judged by shuffled prompts show what chance would score.

    Some examples:
      gobelin evaluate
      gobelin evaluate runs/mine --tasks single_object --limit 100 --json scores.json --sheet sheet.png
    """

    model: Positional[Path | None] = None
    """A diffusers folder; without one, the model that comes with Gobelin."""
    world: str = "nano"
    """The world of scenes that the model was trained on: nano or core."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """single_object, two_objects, position."""
    splits: tuple[str, ...] = ("dev", "heldout")
    """dev: held-in combinations, for development; heldout: combinations that training never saw; test: for the end."""
    limit: int = 100
    """Prompts for each task and split."""
    count: int = 1
    """Pictures for each prompt."""
    device: str | None = None
    """cpu, cuda or mps; without it, the best there is."""
    json: Path | None = None
    """Write the scores here."""
    sheet: Path | None = None
    """Write a picture of all pictures here, the wrong ones framed in red."""


def run(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(Evaluate, "evaluate", arguments)
    world = find_world(options.world)
    for kind, chosen, known in (("task", options.tasks, TASKS), ("split", options.splits, PROMPT_SPLITS)):
        for name in chosen:
            if name not in known:
                raise UsageError(f"unknown {kind} {name!r}: the choices are {', '.join(known)}")
    for name in ("limit", "count"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} is {getattr(options, name)}: give 1 or more")
    if options.sheet is not None and options.sheet.suffix.lower() not in SHEET_SUFFIXES:
        raise UsageError(f"--sheet is {options.sheet}: give a name that ends in {' or '.join(SHEET_SUFFIXES)}")
    pipeline = Pipeline.from_pretrained(options.model, options.device)
    size = pipeline.unet.config.sample_size * pipeline.vae.config.factor
    if size != world.size:
        raise UsageError(f"the model paints {size} pixels and the world {world.name} has {world.size}: not comparable")
    total = len(options.tasks) * len(options.splits) * options.limit * options.count
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("painting", total=total)
        scores, pictures = score(
            pipeline,
            world,
            options.tasks,
            options.splits,
            options.limit,
            options.count,
            advance=lambda painted: progress.advance(bar, painted),
        )
    instruments = check_instruments(pipeline.vae, world)
    print_report([*scores, *shuffled(pictures)], chance(pictures), instruments)
    write_report(options.json, report(scores, pictures, instruments))
    if options.sheet is not None:
        sheet: Image.Image = contact_sheet(pictures)
        with replacing(options.sheet) as temporary:
            sheet.save(temporary, format="PNG" if options.sheet.suffix.lower() == ".png" else "JPEG")


def print_report(scores: list[TaskScore], by_chance: dict[str, float], instruments: Instruments) -> None:
    """The tables."""
    console = Console(width=150)
    table = Table("task", "split", "correct", "colour right", "shape right", "exact scene", "n")
    for row in scores:
        shares = (row.correct, row.colour, row.shape, row.exact)
        table.add_row(row.task, row.split, *map(str, shares), str(row.correct.n))
    console.print(table)
    shares = ", ".join(f"{name} {share:.3f}" for name, share in by_chance.items())
    console.print(f"A perfect painter's score with shuffled prompts: {shares}.\n", highlight=False)
    table = Table("instrument", "exact scene")
    table.add_row("true renders", str(instruments.renders))
    table.add_row(f"VAE round trips ({instruments.psnr:.1f} dB)", str(instruments.round_trips))
    for kind, values in (("blurred by", instruments.blurred), ("with noise of", instruments.noisy)):
        for amount, value in values.items():
            table.add_row(f"{kind} {amount}", f"{value:.3f}")
    console.print(table)
