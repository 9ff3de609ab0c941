"""Checkpoints of a training run: each is written whole, with a checksum, before an older one is removed."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from gobelin.errors import TrainingError
from gobelin.formats.files import sync_folder

CHECKPOINT_FILE = "state.pt"
CHECKSUM_FILE = "state.sha256"
KEPT = 2
"""Checkpoints that are kept: where the newest is damaged, the one before it stands."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``folder/step-N`` by way of a temporary folder, then remove all but the last two.

    Raises :class:`TrainingError` if it cannot be written, for instance to a full disk; the previous one then stands.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with (temporary / CHECKPOINT_FILE).open("wb") as file:
            torch.save({"step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        with (temporary / CHECKSUM_FILE).open("w", encoding="ascii") as file:
            file.write(_sha256(temporary / CHECKPOINT_FILE))
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into either
        shutil.rmtree(temporary, ignore_errors=True)
        before = newest_step(folder)
        raise TrainingError(
            f"the checkpoint of step {step} could not be written to {folder} ({_reason(error)}): "
            + (f"that of step {before} stands, --resume goes on from it" if before else "there is none before it")
        ) from error
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder(folder)
    for older in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(older)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint's state onto the CPU; None if there is none yet.

    Raises :class:`TrainingError` for a file that is not the one that was written.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    try:
        if _sha256(newest / CHECKPOINT_FILE) != (newest / CHECKSUM_FILE).read_text(encoding="ascii"):
            raise ValueError("it is not the file that was written")
        return torch.load(newest / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parser meets
        after = f"from step {_step(checkpoints[-2])}" if len(checkpoints) > 1 else "from the beginning of the stage"
        raise TrainingError(
            f"the checkpoint {newest / CHECKPOINT_FILE} is damaged: remove its folder to go on {after}"
        ) from error


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint; 0 where there is none."""
    return max((_step(one) for one in _checkpoints(folder)), default=0)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    """Say why a file could not be written: torch tells of a full disk as of a position that it did not expect."""
    full = "unexpected pos" in str(error) or getattr(error, "errno", None) == 28
    return "the disk is full" if full else str(error).splitlines()[0]
