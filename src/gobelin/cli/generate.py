"""``gobelin generate``: prompts in, PNG files out."""

from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from gobelin.cli.options import parse
from gobelin.cli.painting import PaintingOptions, paint
from gobelin.errors import UsageError
from gobelin.formats.png import save_picture
from gobelin.look.sheet import word_sheet


@dataclass(frozen=True, kw_only=True)
class Generate(PaintingOptions):
    """Paint pictures from prompts, and print where they are.

    Some examples:
      gobelin generate "a red circle"
      gobelin generate "a red circle" "a blue ring" --count 4 --seed 7 --out pictures
      gobelin generate "three green rings" --maps
      gobelin generate "a castle" --model path/to/a/diffusers/folder --sampler dpmpp_2m_karras --steps 25
    """

    prompts: Positional[tuple[str, ...]]
    """What to paint: one prompt or several, each in quotes."""
    count: int = 1
    """Pictures for each prompt."""
    maps: bool = False
    """Beside each picture, a sheet of what each of its words painted."""


def run(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(Generate, "generate", arguments)
    if not options.prompts:
        raise UsageError('no prompt given: say what to paint, as in gobelin generate "a red circle"')
    settings = {**options.settings(), "count": options.count, "trace": "sharp" if options.maps else False}
    result = paint(options.open(), options.prompts, settings)
    for index, path in enumerate(result.save(options.out)):
        print(path)
        if options.maps:
            heatmaps = result.heatmaps[index]
            sheet = path.with_name(f"{path.stem}-words.png")
            save_picture(sheet, word_sheet(heatmaps, range(len(heatmaps.words))))
            print(sheet)
