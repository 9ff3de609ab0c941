"""Models opened with the options that name them, and painting with a progress bar."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gobelin.checkpoint.shipped import SHIPPED
from gobelin.cli.painting_options import PipelineOptions
from gobelin.cli.report_files import progress_bar
from gobelin.errors import UsageError
from gobelin.painting import PaintingStep, Result
from gobelin.pipeline import Pipeline
from gobelin.prompt_weighting import LoraTag
from gobelin.settings import LEARNED_WORDS, LORAS, NOT_REPEATABLE, Settings
from gobelin.validation import nearest, refuse_unknown, shown, validated

ADDED = (LORAS, LEARNED_WORDS)
"""Keys of an image's settings that name LoRAs and learned words, which have to be loaded."""


def open_pipeline(options: PipelineOptions, tags: Sequence[LoraTag] = ()) -> Pipeline:
    """Open the model that options name, and load what is added to it; LoRAs of ``tags`` are in ``--lora-dir``."""
    tagged = [(_find_lora(options.lora_dir, tag.name), tag.weight) for tag in tags]
    pipeline = Pipeline.from_pretrained(options.model, options.device, options.dtype, options.engine, **options.files())
    for given in options.lora:
        file, weight = _file_and_weight(given)
        pipeline.load_lora(file, weight, allow_pickle=options.allow_pickle)
    for file, weight in tagged:
        pipeline.load_lora(file, weight)
    for file in options.inversion:
        pipeline.load_textual_inversion(file, allow_pickle=options.allow_pickle)
    return pipeline


def settings_of_image(recorded: dict[str, Any], file: Path, model: str | None) -> dict[str, Any]:
    """Check the settings that Gobelin wrote into an image, so that it can be painted again; the prompt is one of them.

    Raises :class:`UsageError` for one that was painted with controls, which its settings do not hold, for settings that
    this version does not know, and where no ``model`` is given for an image of another than Gobelin's own.
    """
    if NOT_REPEATABLE in recorded:
        raise UsageError(
            f"{file} was painted with a control, which an image does not record: take one that was painted without"
        )
    known = [field.name for field in dataclasses.fields(Settings)]
    refuse_unknown(recorded, [*known, *ADDED, "prompt", "model"], what=f"setting in {file}:")
    if "prompt" in recorded:
        validated(f"the prompt in {file}", recorded["prompt"], str)
    painter = recorded.get("model", "")
    if model is None and painter not in ("", SHIPPED):
        raise UsageError(f"{file} was painted by another model, {painter}: give that one as --model")
    return {name: value for name, value in recorded.items() if name != "model"}


def refuse_other_additions(needed: dict[str, Any], pipeline: Pipeline, file: Path) -> None:
    """Raise :class:`UsageError` where an image of Gobelin's needs LoRAs or learned words that were not given."""
    for name, option, there in (
        (LORAS, "--lora", pipeline.loras.weights),
        (LEARNED_WORDS, "--inversion", pipeline.learned_words),
    ):
        if needed.get(name, type(there)()) != there:
            raise UsageError(f"{file} was painted with {needed.get(name) or 'none'} as {option}, and not with {there}")


def paint_with_progress(
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: Settings,
    on_step: Callable[[PaintingStep], None] = lambda step: None,
) -> Result:
    """Paint, with a progress bar where standard error is a terminal."""
    painting = pipeline.start(prompts, **settings)
    with progress_bar("painting", len(painting)) as advance:
        for step in painting:
            on_step(step)
            advance(1)
    return painting.result


def _find_lora(folder: Path | None, name: str) -> Path:
    """Find a LoRA's file by its name without suffix, anywhere in the folder: as it is written, or in any case."""
    assert folder is not None
    if not folder.is_dir():
        raise UsageError(f"--lora-dir is {folder}, which is no folder: give the one that LoRAs are in")
    files = sorted(folder.rglob("*.safetensors"))
    found = [file for file in files if file.stem == name]
    found = found or [file for file in files if file.stem.lower() == name.lower()]
    if len(found) > 1:
        several = ", ".join(str(file.relative_to(folder)) for file in found)
        raise UsageError(f"the LoRA {shown(name)} is in {folder} several times: {shown(several)}; keep one")
    if not found:
        there = nearest(name, [file.stem for file in files]) if files else "there is none"
        raise UsageError(f"there is no {shown(f'{name}.safetensors')} in {folder}: {there}")
    return found[0]


def _file_and_weight(given: str) -> tuple[Path, float]:
    """Split FILE:WEIGHT; the weight is 1 where there is none."""
    name, _, number = given.rpartition(":")
    try:
        return (Path(name), float(number)) if name and not Path(given).exists() else (Path(given), 1.0)
    except ValueError:
        raise UsageError(f"--lora has {given!r}: give FILE, or FILE:WEIGHT with a number") from None
