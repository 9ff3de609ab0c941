"""``gobelin edit``: change words of a prompt, keep its image."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from gobelin.cli.options import Positional, SettingsOf, parse
from gobelin.cli.painting_options import PaintingOptions
from gobelin.settings import EditSettings, Settings


@dataclass(frozen=True, kw_only=True)
class EditOptions(PaintingOptions):
    """Change words of a prompt, and keep its image.

    The first image is painted, or given as --init-image, and then changed towards the second prompt (FlowEdit with
    prompt-to-prompt). Writes the images, and a sheet of both beside what the changed prompt paints by itself from the
    same seed.

    Some examples:
      gobelin edit "a red circle left of a blue square" --to "a green circle left of a blue square" --seed 3
      gobelin edit "a red circle" --to "a blue circle" --init-image image.png
      gobelin edit "a red circle" --to "a red circle and a blue ring" --self-replace 0.2
      gobelin edit "a red circle" --to "a red star" --local-blend circle star
      gobelin edit "a red circle" --to "a red circle" --reweight red=2
    """

    prompt: Positional[str]
    """Prompt of the first image, in quotes."""
    to: str
    """Prompt of the changed image, in quotes."""
    settings: Annotated[dict[str, Any], SettingsOf(EditSettings)] = field(default_factory=dict)


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = parse(EditOptions, "edit", arguments)
    from gobelin.cli.open_and_paint import (
        open_pipeline,  # PyTorch is imported after the options are read: help and mistakes are quick
    )
    from gobelin.formats.png import write_png
    from gobelin.look.word_sheets import comparison_sheet

    (prompt, to), tags = options.take_tags([options.prompt, options.to], options.settings.get("weights"))
    settings = EditSettings(**options.settings)
    pipeline = open_pipeline(options, tags)
    result = pipeline.edit(prompt, to, **settings)
    kept = ("negative_prompt", "steps", "guidance", "guidance_rescale", "sampler", "clip_skip", "weights", "tile")
    same = {name: result.settings[1][name] for name in ("seed", "height", "width")}
    plain = pipeline(to, **Settings(**{name: settings[name] for name in kept}, **same))
    shown = [(prompt, result.images[0]), (to, result.images[1])]
    if settings.init_image is not None:
        result = replace(result, images=result.images[1:], settings=result.settings[1:])
    paths = result.save(options.out)
    sheet = _beside(paths[-1])
    write_png(sheet, comparison_sheet([*shown, ("by itself", plain.images[0])]))
    for path in (*paths, sheet):
        print(path)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-edit.png")
