"""Reports: titled tables of a measurement, made of its JSON so that a file can be shown again, and their Markdown.

Each measurement builds its own :class:`Report` in its own module.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

SPLIT_TITLES = {"dev": "held in (dev)", "test": "held in (test)", "heldout": "held out"}


@dataclass(frozen=True, kw_only=True)
class ReportTable:
    """Rows of text under a title, and a note beneath; the rows numbered in ``bold`` sum up others."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    bold: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The tables of a measurement, and one line that says what was measured."""

    title: str
    description: str
    tables: list[ReportTable]

    def markdown(self, level: int = 1) -> str:
        """Write the report as Markdown, with headings from this level on."""
        parts = [f"{'#' * level} {self.title}", self.description]
        for table in self.tables:
            parts += [
                f"{'#' * (level + 1)} {table.title}",
                _markdown_table(table),
                *([table.note] if table.note else []),
            ]
        return "\n\n".join(parts) + "\n"


def as_json(value: Any) -> Any:
    """Convert a result of dataclasses, dicts and sequences to what JSON holds; NaN becomes None."""
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def share_cell(share: dict[str, Any]) -> str:
    """Write a :class:`gobelin.evaluate.intervals.Share` from JSON as a cell: value and interval, a dash for none."""
    if share["value"] is None:
        return "–"
    return f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"


def mean_cell(mean: dict[str, Any] | None) -> str:
    """Write a :class:`gobelin.evaluate.intervals.Mean` from JSON as a cell: value ± margin, a dash for none."""
    if mean is None or mean["value"] is None:
        return "–"
    return f"{mean['value']:.3f}" if mean["margin"] is None else f"{mean['value']:.3f} ± {mean['margin']:.3f}"


def _markdown_table(table: ReportTable) -> str:
    """Write a table's columns and rows as Markdown."""
    lines = [f"| {' | '.join(table.columns)} |", f"|{'---|' * len(table.columns)}"]
    for number, row in enumerate(table.rows):
        cells = [f"**{cell}**" if number in table.bold and cell else cell for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
