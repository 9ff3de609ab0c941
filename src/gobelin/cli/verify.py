"""``gobelin verify``: an audit of a model, and how far it is from another."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional

from gobelin.checkpoint import open_model
from gobelin.checkpoint.audit import Audit, audit, differences
from gobelin.cli.options import parse, write_report
from gobelin.cli.painting import ModelOptions
from gobelin.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Verify(ModelOptions):
    """Look through a model: keys, shapes, numbers, schedule, and whether it comes back whole when it is written.

    A key that is missing, left over, of another shape or not a number ends it with a sentence. Leaves with 1 where the
    model is not sound.

    Some examples:
      gobelin verify model.safetensors
      gobelin verify folder --against other-folder
      gobelin verify folder --json report.json
    """

    model: Positional[str]
    """A diffusers folder, a .safetensors or .ckpt file, or a Hub name."""
    against: str | None = None
    """Another model: the largest difference of every block's output on the same input."""
    no_round_trip: bool = False
    """Do not write the model to a temporary folder and read it again."""
    json: Path | None = None
    """Write all of it here."""


def run(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(Verify, "verify", arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline = _open(options.model, options)
    found = audit(pipeline.model, [str(one.message) for one in caught], round_trips=not options.no_round_trip)
    report = found.json()
    _print(found)
    if options.against is not None:
        report["differences"] = differences(pipeline.model, _open(options.against, options).model)
        _print_differences(report["differences"])
    write_report(options.json, report)
    if not found.sound:
        sys.exit(1)


def _open(model: str, options: Verify) -> Pipeline:
    opened = open_model(model, torch.device("cpu"), None, **options.files())
    return Pipeline(**vars(opened))


def _print(found: Audit) -> None:
    table = Table(title=escape(found.name))
    for column in ("", "tensors", "parameters", "precision", "largest", "SHA-256"):
        table.add_column(column, justify="left" if column in ("", "precision", "SHA-256") else "right")
    for name, part in found.parts.items():
        table.add_row(
            name,
            f"{part.tensors:,}",
            f"{part.parameters:,}",
            ", ".join(part.dtypes),
            f"{part.largest:.4g}",
            part.sha256[:16],
        )
    console = Console()
    console.print(table)
    schedule = found.schedule
    console.print(
        f"schedule: {schedule['prediction_type']}, {schedule['beta_schedule']}, ᾱ from "
        f"{schedule['first_alpha_cumprod']:.6g} to {schedule['last_alpha_cumprod']:.6g}; {found.tokens:,} tokens"
    )
    for where, whole in found.round_trips.items():
        console.print(f"written as a {where} and read again: {'identical' if whole else 'NOT identical'}")
    for warning in found.warnings:
        console.print(f"warning: {escape(warning)}")
    console.print("sound" if found.sound else "NOT sound")


def _print_differences(found: dict[str, dict[str, float]]) -> None:
    table = Table(title="largest difference of each block's output, as a share of its largest number")
    for column in ("network", "block", "difference"):
        table.add_column(column, justify="right" if column == "difference" else "left")
    for network, blocks in found.items():
        for block, difference in blocks.items():
            table.add_row(network, block, f"{difference:.2e}")
    Console().print(table)
