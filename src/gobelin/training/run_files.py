"""The files that a training run leaves in its folder, read as they are: what is missing or damaged becomes a sentence.

A run may be training, or have been killed while it wrote; nothing here raises for that.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gobelin.errors import GobelinError, TrainingError
from gobelin.formats.files import read_json
from gobelin.training.caption_validation import CaptionLosses

_SPLITS = ("held_out", "training")
_SHEET = re.compile(r"([a-z_]+)-(\d{1,12})\.png")
_MOST_BYTES = 200_000_000  # of a file of lines: a run of a million steps has some 10 million

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The content of a run's ``training`` folder; empty where a file is missing, and ``notes`` then says so.

    ``metrics`` are lines by stage, ``validation`` by split, ``sheets`` paths of images by stage, each in the order of
    steps.
    """

    folder: Path
    config: Line = field(default_factory=dict)
    data: Line = field(default_factory=dict)
    metrics: dict[str, list[Line]] = field(default_factory=dict)
    validation: dict[str, list[Line]] = field(default_factory=dict)
    attention: list[Line] = field(default_factory=list)
    nearest: list[Line] = field(default_factory=list)
    sheets: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_run(run_folder: Path) -> RunFiles:
    """Read a run's files. Raises :class:`TrainingError` for a folder that holds no training run."""
    folder = run_folder / "training"
    if not folder.is_dir():
        raise TrainingError(f"{run_folder} holds no training run: give the folder that gobelin train --out wrote")
    notes: list[str] = []
    validation = _lines(folder / "validation.jsonl", notes, _check_validation)
    return RunFiles(
        folder=folder,
        config=_object(folder / "config.json", notes),
        data=_object(folder / "data.json", notes),
        metrics=_by(_lines(folder / "metrics.jsonl", notes, _check_stage), "stage"),
        validation={split: [line for line in validation if line["split"] == split] for split in _SPLITS},
        attention=_lines(folder / "attention.jsonl", notes),
        nearest=_nearest(folder / "nearest.json", notes),
        sheets=_sheets(folder / "samples"),
        notes=notes,
    )


def column(lines: list[Line], name: str) -> tuple[list[int], list[float]]:
    """Select a number from lines: (steps, values), without those lines where it is missing or not finite."""
    found = [(line["step"], number(line.get(name))) for line in lines]
    return [step for step, value in found if value is not None], [value for _, value in found if value is not None]


def number(value: Any) -> float | None:
    """Return a finite number as a float, and None for anything else that a JSON file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def inside(folder: Path, name: Any) -> Path | None:
    """Name a file inside of a folder by its relative path; None for one that leads out of it."""
    if not isinstance(name, str) or "\0" in name:
        return None
    file = (folder / name).resolve()
    return file if file.is_relative_to(folder.resolve()) else None


def _object(file: Path, notes: list[str]) -> Line:
    try:
        return read_json(file)
    except (GobelinError, OSError):
        notes.append(f"{file.name} {'cannot be read' if file.exists() else 'is not there'}.")
        return {}


def _lines(file: Path, notes: list[str], check: Callable[[Line], object] = lambda line: None) -> list[Line]:
    """Read a file of JSON lines by step; of a step that was trained twice, in a run that was resumed, the last counts.

    A last line that was cut off while it was written is left out without a word: while a run trains that is no damage.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            notes.append(f"{file.name} has more than {_MOST_BYTES:,} bytes, and is left out.")
            return []
        texts = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        notes.append(f"{file.name} {'is not there' if isinstance(error, FileNotFoundError) else 'cannot be read'}.")
        return []
    lines: dict[tuple[object, ...], Line] = {}
    damaged = 0
    for place, text in enumerate(texts):
        if not text.strip():
            continue
        try:
            line = _step_line(text)
            check(line)
            lines[str(line.get("stage")), str(line.get("split")), line["step"]] = line
        except (ValueError, RecursionError, TrainingError):
            damaged += place < len(texts) - 1
    if damaged:
        notes.append(f"{file.name} has {damaged:,} damaged {'line' if damaged == 1 else 'lines'}, left out.")
    return sorted(lines.values(), key=lambda line: line["step"])


def _step_line(text: str) -> Line:
    """Read a line; ValueError for anything but an object with the number of a step."""
    line = json.loads(text)
    if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < 10**12:
        raise ValueError("not a line of a step")
    return line


def _check_stage(line: Line) -> None:
    if not isinstance(line.get("stage"), str):
        raise ValueError("not a line of a stage")


def _check_validation(line: Line) -> None:
    CaptionLosses.from_record(line)
    if line.get("split") not in _SPLITS:
        raise ValueError("not a line of a split")


def _by(lines: list[Line], name: str) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line[name], []).append(line)
    return groups


def _sheets(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """Find the sheets ``STAGE-STEP.png``, by stage and in the order of steps."""
    sheets: dict[str, list[tuple[int, Path]]] = {}
    for file in folder.glob("*.png"):
        if named := _SHEET.fullmatch(file.name):
            sheets.setdefault(named[1], []).append((int(named[2]), file))
    return {stage: sorted(sheets[stage]) for stage in sorted(sheets)}


def _nearest(file: Path, notes: list[str]) -> list[Line]:
    """Read the list of nearest training images, which a run need not have."""
    if not file.exists():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, list):
        notes.append(f"{file.name} cannot be read.")
        return []
    return [one for one in content if isinstance(one, dict)]
