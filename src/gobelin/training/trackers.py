"""Trackers: what a run logs, shown by TensorBoard, Weights & Biases or Trackio while it trains.

None is needed: the files in the run's folder hold the same numbers, and gobelin report draws them.
"""

import json
import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from gobelin.errors import TrainingError, UsageError
from gobelin.images import open_image
from gobelin.validation import shown

TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]
_PROJECT = "gobelin"


@runtime_checkable
class Tracker(Protocol):
    """A place that numbers and images of a run are sent to, by stage and step; steps of a stage only grow."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Send numbers of a step by their names."""
        ...

    def image(self, stage: str, step: int, path: Path) -> None:
        """Send an image file, such as a sheet of samples."""
        ...

    def close(self) -> None:
        """Send what is left, and end."""
        ...


_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def require_tracker(name: TrackerName) -> None:
    """Raise :class:`TrainingError` where a tracker's package is missing, before anything else is done."""
    if name in _PACKAGES:
        _import(_PACKAGES[name], name)


def open_tracker(name: TrackerName, run_folder: Path, config: Mapping[str, Any]) -> Tracker:
    """Open a tracker for a run, and send its configuration; "none" tracks nothing.

    TensorBoard's files, and those of wandb, are in ``run_folder/training``. A run that is resumed goes on in the same
    place. Raises :class:`TrainingError` where the tracker's package is missing or it cannot start, and
    :class:`UsageError` for an unknown name.
    """
    match name:
        case "none":
            return NoTracker()
        case "tensorboard":
            return TensorBoardTracker(_import(_PACKAGES[name], name), run_folder, config)
        case "wandb" | "trackio":
            return WandbTracker(_import(_PACKAGES[name], name), run_folder, config)
    raise UsageError(f"the tracker is {shown(name)}: give one of {', '.join(get_args(TrackerName))}")


class NoTracker:
    """Track nothing."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, stage: str, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Write event files to ``training/tensorboard``, for ``tensorboard --logdir``."""

    def __init__(self, module: Any, run_folder: Path, config: Mapping[str, Any]):
        self._writer = module.SummaryWriter(log_dir=str(run_folder / "training" / "tensorboard"))
        listed = json.dumps(dict(config), indent=2, ensure_ascii=False, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in listed.splitlines()))  # code, in Markdown

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Write numbers as scalars ``stage/name``."""
        for name, value in values.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def image(self, stage: str, step: int, path: Path) -> None:
        """Write an image as ``stage/samples``."""
        self._writer.add_image(f"{stage}/samples", np.asarray(open_image(path)), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """Send to Weights & Biases, or to Trackio, whose interface is the same, as the run of the folder's name.

    Their own steps have to grow, and those of stages begin anew: the step is sent as a number beside the others.
    """

    def __init__(self, module: Any, run_folder: Path, config: Mapping[str, Any]):
        self._module = module
        self._staged: set[str] = set()
        name = run_folder.resolve().name
        options: dict[str, Any] = {"project": _PROJECT, "name": name, "config": dict(config), "resume": "allow"}
        if self._is_wandb:
            folder = run_folder / "training"
            folder.mkdir(parents=True, exist_ok=True)
            options |= {"dir": str(folder), "id": _run_id(folder / "wandb_run.txt")}
        try:
            self._run = module.init(**options)
        except Exception as error:  # of the service: no login, no network
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrainingError(
                f"the tracker {module.__name__} cannot start ({reason}): log in to it, or train without a tracker"
            ) from error

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Send numbers as ``stage/name``."""
        self._send(stage, step, values)

    def image(self, stage: str, step: int, path: Path) -> None:
        """Send an image as ``stage/samples``."""
        self._send(stage, step, {"samples": self._module.Image(str(path))})

    def close(self) -> None:
        """Send what is left, and end the run."""
        self._run.finish()

    def _send(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        if self._is_wandb and stage not in self._staged:
            self._staged.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    @property
    def _is_wandb(self) -> bool:
        return self._module.__name__ == "wandb"


def _import(module: str, package: str) -> Any:
    """Import a tracker's package, which Gobelin does not need otherwise."""
    try:
        return import_module(module)
    except ImportError as error:
        raise TrainingError(f"to track with {package}, pip install 'gobelin[{package}]'") from error


def _run_id(file: Path) -> str:
    """Read the run's identifier, or make and keep one, so that a resumed run goes on where it was."""
    if not file.exists():
        file.write_text(secrets.token_hex(4), encoding="ascii")
    return file.read_text(encoding="ascii").strip()
