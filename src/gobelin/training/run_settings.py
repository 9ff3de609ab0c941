"""The settings of a run from its ``config.json``, whatever is in it: looked up, and compared with the presets."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from gobelin.training.presets import TRAINING_PRESETS
from gobelin.training.run_files import number

_SECTIONS = {"text_encoder": "text"}  # of the configuration, where they have not the name of their stage


def stage_setting(config: dict[str, Any], stage: str, name: str) -> float | None:
    """Look up a number among a stage's ``optim`` settings; None where there is none."""
    section = config.get(_SECTIONS.get(stage, stage))
    optim = section.get("optim") if isinstance(section, dict) else None
    return number(optim.get(name)) if isinstance(optim, dict) else None


def planned_steps(config: dict[str, Any], stage: str) -> int | None:
    """Look up how many steps a stage is to have; None where the configuration does not say."""
    steps = stage_setting(config, stage, "steps")
    return None if steps is None else int(steps)


def is_finished(config: dict[str, Any], steps: Mapping[str, int]) -> bool:
    """Tell whether every stage has the steps that it is to have; ``steps`` are those of the stages that have begun."""
    if not steps or ("method" not in config and "unet" not in steps):  # from scratch, the U-Net comes last
        return False
    planned = {stage: planned_steps(config, stage) for stage in steps}
    return all(most is not None and most <= steps[stage] for stage, most in planned.items())


def changed_settings(config: dict[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """Compare with the preset that has the fewest differences, which the file does not name.

    Returns its name and rows of (dotted name, value, the preset's value), a dash where one of them has none.
    """
    found = []
    ours = _flat(config)
    for name, preset in TRAINING_PRESETS.items():
        theirs = _flat(json.loads(json.dumps(dataclasses.asdict(preset()))))
        keys = [*ours, *(key for key in theirs if key not in ours)]
        rows = [(key, ours.get(key, "–"), theirs.get(key, "–")) for key in keys if ours.get(key) != theirs.get(key)]
        found.append((name, rows))
    return min(found, key=lambda one: len(one[1]))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to dotted names and values as they are written in JSON."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat
