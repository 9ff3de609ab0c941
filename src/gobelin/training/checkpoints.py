"""Checkpoints of a training run: each is written whole before the previous one is removed."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from gobelin.errors import TrainingError
from gobelin.formats.files import sync_folder

CHECKPOINT_FILE = "state.pt"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``folder/step-N`` by way of a temporary folder, then remove older checkpoints.

    Raises :class:`TrainingError` if it cannot be written, for instance to a full disk; the previous one then stands.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with (temporary / CHECKPOINT_FILE).open("wb") as file:
            torch.save({"step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into either
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingError(
            f"the checkpoint of step {step} could not be written to {folder} ({error}): the previous one stands"
        ) from error
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder(folder)
    for older in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(older)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint's state onto the CPU; None if there is none yet.

    Raises :class:`TrainingError` for a damaged file.
    """
    checkpoints = sorted(folder.glob("step-*"))
    if not checkpoints:
        return None
    file = checkpoints[-1] / CHECKPOINT_FILE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parser meets
        raise TrainingError(f"the checkpoint {file} cannot be read ({error}): remove its folder") from error
