"""``gobelin edit``: change words, keep the picture."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from gobelin.cli.options import parse
from gobelin.cli.painting import PaintingOptions, opened_picture
from gobelin.errors import UsageError
from gobelin.formats.png import write_png
from gobelin.look.word_sheets import comparison_sheet
from gobelin.tokenizer import Word


@dataclass(frozen=True, kw_only=True)
class Edit(PaintingOptions):
    """Change words of a prompt and keep its picture.

    The first picture is painted, or given, and then changed towards the second prompt (FlowEdit with prompt-to-prompt).
    Writes what was painted, and a sheet of both beside what the changed prompt gives by itself from the same seed.

    Some examples:
      gobelin edit "a red circle left of a blue square" --to "a green circle left of a blue square" --seed 3
      gobelin edit "a red circle" --to "a blue circle" --init-image picture.png
      gobelin edit "a red circle" --to "a red circle and a blue ring" --own 0.2
      gobelin edit "a red circle" --to "a red star" --blend circle star
      gobelin edit "a red circle" --to "a red circle" --reweight red=2
    """

    prompt: Positional[str]
    """What to paint."""
    to: str
    """The changed prompt."""
    init_image: Path | None = None
    """A picture that the first prompt describes, to be changed; without it, one is painted."""
    mask: Path | None = None
    """Change nothing but where this is white."""
    strength: float = 1.0
    """0 to 1: how far back towards noise the change begins; less changes less."""
    cross: float = 0.8
    """Share of the way in which words keep the attention of those they stand for."""
    own: float = 0.6
    """Share of the way in which patches look at each other as in the first picture."""
    push: float = 2.0
    """How hard to push from the first prompt's words to the changed ones, beside the guidance."""
    reweight: tuple[str, ...] = ()
    """WORD=NUMBER: look at a word of the changed prompt so many times as much."""
    blend: tuple[str, ...] | None = None
    """Change nothing outside of the pixels of these words; without it, of those that changed."""


def run(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(Edit, "edit", arguments)
    reweight: dict[Word, float] = dict(map(_weight, options.reweight))
    given = {"init_image": options.init_image, "mask": options.mask}
    pictures: dict[str, Any] = {name: opened_picture(file) for name, file in given.items() if file is not None}
    pipeline = options.open()
    result = pipeline.edit(
        options.prompt,
        options.to,
        strength=options.strength,
        cross=options.cross,
        own=options.own,
        push=options.push,
        reweight=reweight,
        blend=options.blend,
        **pictures,
        **options.settings(),
    )
    same = {name: result.settings[1][name] for name in ("seed", "height", "width")}
    plain = pipeline(options.to, **{**options.settings(), **same})
    shown = [(options.prompt, result.images[0]), (options.to, result.images[1])]
    if options.init_image is not None:
        result = replace(result, images=result.images[1:], settings=result.settings[1:])
    paths = result.save(options.out)
    sheet = paths[-1].with_name(f"{paths[-1].stem}-edit.png")
    write_png(sheet, comparison_sheet([*shown, ("by itself", plain.images[0])]))
    for path in (*paths, sheet):
        print(path)


def _weight(text: str) -> tuple[Word, float]:
    word, _, number = text.rpartition("=")
    try:
        return word, float(number)
    except ValueError:
        raise UsageError(f"--reweight has {text!r}: give WORD=NUMBER, as in red=2") from None
