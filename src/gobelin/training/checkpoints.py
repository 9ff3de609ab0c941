"""Checkpoints: written whole beside the old one, which goes only when the new one stands."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from gobelin.errors import TrainingError
from gobelin.formats.files import sync_folder

FILE = "state.pt"


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``folder/step-N`` (a temporary folder, renamed), then remove the older ones."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with (temporary / FILE).open("wb") as file:
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


def load(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint's state, on the CPU; None where there is none yet."""
    checkpoints = sorted(folder.glob("step-*"))
    if not checkpoints:
        return None
    file = checkpoints[-1] / FILE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parser meets
        raise TrainingError(f"the checkpoint {file} cannot be read ({error}): remove its folder") from error
