"""The work of ``gobelin generate``: settings from options and images, painting, files."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gobelin.cli.generate import Generate
from gobelin.cli.open_and_paint import (
    ADDED,
    open_pipeline,
    paint_with_progress,
    refuse_other_additions,
    settings_of_image,
)
from gobelin.errors import UsageError
from gobelin.formats.generation_info.draft import GOBELIN
from gobelin.formats.png import write_png
from gobelin.images import open_image, open_mask
from gobelin.inpainting import digest
from gobelin.look.word_sheets import word_sheet
from gobelin.prompt_weighting import LoraTag, refuse_foreign_syntax
from gobelin.samplers import SAMPLERS
from gobelin.settings import Settings


def paint_prompts(options: Generate) -> None:
    """Paint the prompts that are given, or those of an image; print where the images are."""
    prompts, settings, needed, tags = _to_paint(options)
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        listed = ", ".join(map(repr, prompts))
        print(
            f"gobelin: painting {len(prompts)} prompts, {listed}: a prompt of several words needs quotes",
            file=sys.stderr,
        )
    checked = Settings(**settings, trace="sharp" if options.maps else False)
    pipeline = open_pipeline(options, tags)
    if needed is not None:
        assert options.from_ is not None
        refuse_other_additions(needed, pipeline, options.from_)
    result = paint_with_progress(pipeline, prompts, checked)
    for index, path in enumerate(result.save(options.out)):
        print(path)
        if options.maps:
            heatmaps = result.heatmaps[index]
            sheet = path.with_name(f"{path.stem}-words.png")
            write_png(sheet, word_sheet(heatmaps, range(len(heatmaps.words))))
            print(sheet)


def _to_paint(options: Generate) -> tuple[Sequence[str], dict[str, Any], dict[str, Any] | None, list[LoraTag]]:
    """Put together prompts and settings, as given and as an image says; for one of Gobelin's, what it needs loaded.

    Last come the LoRAs that prompts ask for.
    """
    given = options.settings
    if options.from_ is None:
        if not options.prompts:
            raise UsageError('no prompt given: put what to paint first, as in gobelin generate "a red circle"')
        prompts, tags = options.take_tags(options.prompts, given.get("weights"))
        return prompts, given, None, tags
    from gobelin.formats.generation_info.all_programs import read_generation_info  # parsers that few paintings need

    found = read_generation_info(options.from_, SAMPLERS)
    ours = found.source == GOBELIN
    recorded = settings_of_image(found.settings, options.from_, options.model) if ours else dict(found.settings)
    has_tags = options.lora_dir is not None and given.get("weights") != "none"
    found_loras = dict(found.loras) if has_tags and not options.prompts else {}
    if "prompt" not in recorded and not options.prompts:
        why = next((missing for missing in found.missing if "prompt" in missing), "it holds none")
        raise UsageError(f"{options.from_} does not say its prompt: give one of your own ({why})")
    prompts = options.prompts or (" ".join([recorded.get("prompt", ""), *found_loras]),)
    settings = {**recorded, **given}
    prompts, tags = options.take_tags(prompts, settings.get("weights"))
    for prompt in () if ours else prompts:
        refuse_foreign_syntax(prompt, given.get("weights", recorded["weights"]))
    for missing in (one for one in found.missing if one not in found_loras.values()):
        print(f"gobelin: {options.from_} cannot be repeated exactly: {missing}", file=sys.stderr)
    model = recorded.get("model", "")
    if model and options.model is None:
        print(f"gobelin: {options.from_} was painted by {model}: give --model to use that one", file=sys.stderr)
    needed = {name: recorded[name] for name in ADDED if name in recorded}
    settings = {name: value for name, value in settings.items() if name not in (*ADDED, "prompt", "model")}
    _refuse_other_images(recorded, given, options.from_)
    return prompts, settings, needed if ours else None, tags


def _refuse_other_images(recorded: dict[str, Any], given: dict[str, Any], file: Path) -> None:
    """Raise :class:`UsageError` where the init image or mask given is not the one that an image was painted with."""
    for name, opened in (("init_image", open_image), ("mask", open_mask)):
        if name in recorded and name not in given:
            raise UsageError(
                f"{file} was painted with an {name}, which it does not hold: give its --{name.replace('_', '-')}"
            )
        if name in recorded and digest(opened(given[name], name)) != recorded[name]:
            raise UsageError(f"{given[name]} is not the {name} that {file} was painted with")
