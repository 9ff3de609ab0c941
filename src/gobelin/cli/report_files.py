"""Reports of measurements on the command line: printed, written as JSON and Markdown, and a bar while they are made."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gobelin.cli.options import write_report
from gobelin.errors import UsageError
from gobelin.evaluate.measurement_report import Report
from gobelin.formats.files import replacing, write_text

_SHEET_SUFFIXES = (".png", ".jpg")


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Files that every measurement can write."""

    json: Path | None = None
    """Write the results here as JSON."""
    report: Path | None = None
    """Write the tables here as Markdown."""


def require_sheet_suffix(file: Path | None) -> None:
    """Check, before anything is painted, that a contact sheet's name ends as an image's."""
    if file is not None and file.suffix.lower() not in _SHEET_SUFFIXES:
        raise UsageError(f"--sheet is {file}: give a name that ends in {' or '.join(_SHEET_SUFFIXES)}")


def write_sheet(file: Path, sheet: Image.Image) -> None:
    """Write a contact sheet, as PNG or JPEG."""
    with replacing(file) as temporary:
        sheet.save(temporary, format="PNG" if file.suffix.lower() == ".png" else "JPEG", quality=90)


@contextmanager
def progress_bar(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar where a person is watching; yields a function that advances it by a number of images."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console  # imported where it is needed: help and painting have to begin quickly
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)


def publish(options: ReportFiles, content: dict[str, Any], report: Report) -> None:
    """Print a report, and write it where ``--json`` and ``--report`` ask for it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    console.print(report.description, highlight=False)
    for table in report.tables:
        grid = Table(*table.columns, title=table.title, title_justify="left", title_style="bold")
        for number, row in enumerate(table.rows):
            grid.add_row(*row, style="bold" if number in table.bold else None, end_section=number in table.bold)
        console.print()
        console.print(grid, highlight=False)
        if table.note:
            console.print(table.note, highlight=False)
    write_report(options.json, content)
    if options.report is not None:
        write_text(options.report, report.markdown())
