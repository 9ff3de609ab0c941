"""``gobelin report``: write the page that tells how a training run went."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gobelin.cli.options import Positional, parse
from gobelin.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ReportOnRun:
    """Write the page that tells how a training run went: is the caption heard, samples, curves, settings.

    It is made from the files in the run's folder alone: while the run trains, after it was stopped, and again. It opens
    from disk, without a network.

    Some examples:
      gobelin report runs/mine
      gobelin report runs/mine --out mine.html
    """

    run: Positional[Path]
    """The folder of a run, as given to gobelin train --out."""
    out: Path | None = None
    """The file to write; by default training/report.html in the run's folder."""


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin report``."""
    options = parse(ReportOnRun, "report", arguments)
    if options.out is not None and options.out.is_dir():
        raise UsageError(
            f"--out is {options.out}, a folder: give the name of a file, such as {options.out}/report.html"
        )
    from gobelin.training.run_report import (
        write_run_report,  # PyTorch is imported after the options are read: help and mistakes are quick
    )

    print(write_run_report(options.run, options.out))
