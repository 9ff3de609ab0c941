"""Claim of a run's folder: its configuration and data recorded, or compared with those recorded before."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gobelin.errors import TrainingError
from gobelin.formats.files import read_json, write_json
from gobelin.training.checkpoints import newest_step
from gobelin.training.config import RunConfig, config_file

# Fields that change no weight: when something is written, where the same data and the device are, what is recommended.
_HARMLESS = (
    *("save_every", "sample_every", "sample_prompts", "samples", "tracker", "device", "parallelism", "recommended."),
    *("data.path", "data.cache", "data.workers", "prior.path"),
)
# Settings that change the rounding of sums alone, as another number of processes does.
_ROUNDING = (".gradient_checkpointing", ".optim.accumulate", ".optim.compile")


def done_stages(out: Path) -> list[str]:
    """List the stages of a run that are done."""
    file = out / "training" / "done.json"
    return read_json(file)["stages"] if file.exists() else []


def check_folder(out: Path, resume: bool) -> None:
    """Raise :class:`TrainingError` for a folder that cannot be begun in, or not be gone on in; writes nothing."""
    if config_file(out).exists():
        if not resume:
            raise TrainingError(
                f"{out} holds a training run: add --resume (resume=True) to go on, or choose another folder"
            )
        return
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file: choose a folder to write the model to")
    if out.exists() and any(out.iterdir()) and [one.name for one in out.iterdir()] != ["training"]:
        raise TrainingError(f"{out} is not empty and holds no training run: choose another folder")
    if resume:
        raise TrainingError(f"{out} holds no training run to resume: leave out --resume (resume=True) to start one")


def claim(out: Path, config: RunConfig, data: dict[str, Any], may_change: Callable[[str, Any, Any], bool]) -> list[str]:
    """Record a run's configuration and data in its folder, or compare them with what is recorded.

    ``data`` has a description, a count and a fingerprint; ``may_change(name, was, now)`` says whether a setting other
    than the harmless ones may be another. Returns the stages that are done. Raises :class:`TrainingError` for another
    configuration and for other data.
    """
    recorded, data_file = config_file(out), out / "training" / "data.json"
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    if not recorded.exists():
        write_json(data_file, data)
        write_json(recorded, values)
        return []
    for name, was, now in differences(read_json(recorded), values):
        if not name.startswith(_HARMLESS) and not name.endswith(_ROUNDING) and not may_change(name, was, now):
            raise TrainingError(f"the run in {out} has another configuration: {name} was {was!r} and is {now!r}")
    before = read_json(data_file)
    if before["fingerprint"] != data["fingerprint"]:
        raise TrainingError(
            f"the run in {out} began with other data: {before['description']}; now it is {data['description']}"
            + (", with other captions or images" if before["count"] == data["count"] else "")
        )
    write_json(recorded, values)
    return done_stages(out)


def is_longer(name: str, was: Any, now: Any, stages: dict[str, str], config: Any, out: Path) -> bool:
    """Tell whether a change makes a stage longer while its learning rate holds: its steps so far are the same.

    ``stages`` are the sections of the configuration by stage. Raises :class:`TrainingError` where it is too late.
    """
    section, _, field = name.partition(".")
    stage = next((stage for stage, own in stages.items() if own == section), None)
    if field != "optim.steps" or stage is None or not now > was:
        return False
    is_done = stage in done_stages(out)
    optim = getattr(config, section).optim
    saved = newest_step(out / "training" / "checkpoints" / stage)
    falls = min(max(optim.warmup_steps, round(optim.hold * steps)) for steps in (was, now))
    if is_done or saved > falls:
        raise TrainingError(
            f"{name} was {was} and is {now}: a stage can be made longer until its learning rate falls, at step "
            f"{falls}, and {'it is done' if is_done else f'it is saved at step {saved}'}"
        )
    return True


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """List the fields in which two configurations differ: (dotted name, old value, new value)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new
