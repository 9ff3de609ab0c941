"""``gobelin generate``: prompts in, PNG files out."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from gobelin.cli.options import parse
from gobelin.cli.painting import NEEDED, PaintingOptions, opened_picture, paint, refuse_others, repeatable
from gobelin.errors import UsageError
from gobelin.formats.png import read_generation_info, write_png
from gobelin.inpainting import digest
from gobelin.look.word_sheets import word_sheet
from gobelin.samplers import SAMPLERS


@dataclass(frozen=True, kw_only=True)
class Generate(PaintingOptions):
    """Paint pictures from prompts, and print where they are.

    Some examples:
      gobelin generate "a red circle"
      gobelin generate "a red circle" "a blue ring" --count 4 --seed 7 --out pictures
      gobelin generate "three green rings" --maps
      gobelin generate "a blue ring" --init-image picture.png --strength 0.6 --mask hole.png
      gobelin generate --from picture.png --steps 50
      gobelin generate "a castle" --model model.safetensors --lora style.safetensors:0.7 --sampler dpmpp_2m_karras
    """

    prompts: Positional[tuple[str, ...]] = ()
    """What to paint: one prompt or several, each in quotes."""
    count: int = 1
    """Pictures for each prompt."""
    init_image: Path | None = None
    """A picture to paint over."""
    strength: float | None = None
    """0 to 1: how much of it to paint over; without it, 0.8."""
    mask: Path | None = None
    """Of that picture: paint where this is white, and change nothing elsewhere."""
    from_: Annotated[Path | None, arg(name="from")] = None
    """Paint what a PNG of Gobelin's, AUTOMATIC1111's or ComfyUI's says of itself; what is given besides holds."""
    maps: bool = False
    """Beside each picture, a sheet of what each of its words painted."""


def run(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(Generate, "generate", arguments)
    prompts, settings = what_to_paint(options)
    needed = {name: settings.pop(name) for name in NEEDED if name in settings}
    settings |= pictures(options, settings)
    settings |= {"count": options.count, "trace": "sharp" if options.maps else False}
    pipeline = options.open()
    if options.from_ is not None and settings.pop("repeats", False):
        refuse_others(needed, pipeline, options.from_)
    result = paint(pipeline, prompts, settings)
    for index, path in enumerate(result.save(options.out)):
        print(path)
        if options.maps:
            heatmaps = result.heatmaps[index]
            sheet = path.with_name(f"{path.stem}-words.png")
            write_png(sheet, word_sheet(heatmaps, range(len(heatmaps.words))))
            print(sheet)


def what_to_paint(options: Generate) -> tuple[Sequence[str], dict[str, Any]]:
    """Prompts and settings: as given, or as a picture says and where more is given, that."""
    if options.from_ is None:
        if not options.prompts:
            raise UsageError('no prompt given: say what to paint, as in gobelin generate "a red circle"')
        return options.prompts, options.settings()
    found = read_generation_info(options.from_, SAMPLERS)
    ours = found.source == "gobelin"
    settings = repeatable(found.settings, options.from_, options.model) if ours else found.settings
    for missing in found.missing:
        print(f"gobelin: {options.from_} cannot be repeated in this: {missing}", file=sys.stderr)
    model = settings.pop("model", "")
    if model and options.model is None:
        print(f"gobelin: {options.from_} was painted by {model}: give that as --model", file=sys.stderr)
    prompt = settings.pop("prompt", "")
    given = {name: value for name, value in options.settings().items() if value is not None}
    return options.prompts or (prompt,), {"seed": None, **settings, **given, "repeats": ours}


def pictures(options: Generate, settings: dict[str, Any]) -> dict[str, Any]:
    """The pictures to paint over, opened, in place of what tells them apart from others."""
    given = {"init_image": options.init_image, "mask": options.mask}
    opened: dict[str, Any] = {name: opened_picture(file) for name, file in given.items() if file is not None}
    for name in ("init_image", "mask"):
        if name in settings and name not in opened:
            raise UsageError(
                f"{options.from_} was painted over a picture that it does not hold: give its --{name.replace('_', '-')}"
            )
        if isinstance(settings.get(name), str) and digest(opened[name]) != settings[name]:
            raise UsageError(f"{given[name]} is not the picture that {options.from_} was painted over")
    if options.strength is not None:
        opened["strength"] = options.strength
    return opened
