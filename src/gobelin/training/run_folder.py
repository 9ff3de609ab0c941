"""The ``training`` folder of a run: its metrics, checkpoints and sample sheets, and the lock of the process in it."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from gobelin.errors import TrainingError
from gobelin.formats.files import replacing, write_text
from gobelin.training import distributed
from gobelin.training.parallelize import Parallelism
from gobelin.training.trackers import NoTracker, Tracker

METRICS, LOCK = "metrics.jsonl", "lock"
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp|\.step-\d+\.tmp")  # of replacing(), and of a checkpoint


@dataclass(frozen=True, kw_only=True)
class Run:
    """The ``training`` folder of a run, and the settings that all stages share."""

    folder: Path
    seed: int
    device: torch.device
    save_every: int
    sample_every: int
    console: Console
    parallelism: Parallelism = "ddp"
    tracker: Tracker = field(default_factory=NoTracker)

    def checkpoint_folder(self, stage: str) -> Path:
        """Name the folder of a stage's checkpoints."""
        return self.folder / "checkpoints" / stage

    def log(self, stage: str, values: dict[str, Any], file: str = METRICS) -> None:
        """Append a line to ``metrics.jsonl`` or another file of records, in the main process."""
        if not distributed.is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / file).open("a", encoding="utf-8") as records:
            records.write(json.dumps({"stage": stage, **values}) + "\n")
        if file == METRICS:
            self.tracker.log(stage, values["step"], {name: one for name, one in values.items() if name != "step"})

    def forget_after(self, stage: str, step: int, evaluated: int | None = None) -> None:
        """Remove a stage's records after ``step``: those steps are to be trained again.

        Of the records of evaluations those after ``evaluated`` are removed, ``step`` itself by default.
        """
        if not distributed.is_main_process():
            return
        for file in self.folder.glob("*.jsonl"):
            last = step if file.name == METRICS or evaluated is None else evaluated
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if not _is_after(line, stage, last)]
            if len(kept) < len(lines):
                write_text(file, "".join(kept))

    def save_sheet(self, name: str, step: int, sheet: Image.Image) -> Path:
        """Write a sheet of samples to ``samples/NAME-STEP.png``."""
        path = self.folder / "samples" / f"{name}-{step:06d}.png"
        with replacing(path) as temporary:
            sheet.save(temporary, format="PNG")
        self.tracker.image(name, step, path)
        return path


def _is_after(line: str, stage: str, step: int) -> bool:
    """Tell whether a record is of a later step, or was cut off while it was written."""
    try:
        found = json.loads(line)
        return found["stage"] == stage and found["step"] > step
    except (ValueError, KeyError, TypeError):
        return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder: a second run in it raises :class:`TrainingError`. The lock ends with the process.

    Temporary files in the run's folder are then those of a process that was killed, and are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        process = file.readline().strip()
        file.close()
        raise TrainingError(
            f"another run is training in {folder.parent} (process {process}): wait for it, or choose another folder"
        ) from error
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n{distributed.launch()}\n")
        file.flush()
        _remove_temporary(folder)
        yield


def is_begun_by_this_launch(folder: Path) -> bool:
    """Tell whether ``torchrun`` has started this process again, and the run in ``folder`` is the one it began."""
    file = folder / LOCK
    if not (distributed.is_restarted() and file.is_file()):
        return False
    return file.read_text(encoding="utf-8").splitlines()[1:] == [distributed.launch()]


def _remove_temporary(folder: Path) -> None:
    """Remove what a process that was killed left half-written in a run's folder, beside its ``training`` and in it."""
    for path in [*folder.parent.glob("*/.*.tmp"), *folder.parent.glob(".*.tmp"), *folder.rglob(".*.tmp")]:
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
