"""Draw the picture of the scenes, the first six of each kind: python scripts/scenes_sheet.py docs/scenes.png"""

import sys
import textwrap
from itertools import count, islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gobelin.scenes import CORE, RICH, Sample, World, sample

COLUMNS, CELL, GAP, HEADING, MARGIN = 6, 160, 20, 76, 34
STEP = 4  # between the levels that are kept: the noise makes a large file
PAPER, INK, FAINT = "#fbfaf7", "#2b2b2b", "#8a8578"
# Each with the room below its pictures.
TIERS = (
    (CORE, 74, "solid shapes, ten colours, up to four objects, four relations, quiet backgrounds"),
    (RICH, 78, "and textures, sizes, named backgrounds with gradients and noise, things inside rings"),
)


def main(file: Path) -> None:
    """A heading for each tier, and a row for each category below it."""
    width = 2 * MARGIN + COLUMNS * (CELL + GAP) - GAP
    height = 2 * MARGIN + sum(HEADING + len(world.categories) * (CELL + room) for world, room, _ in TIERS)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = MARGIN
    for world, room, about in TIERS:
        draw.text((MARGIN, y), world.name, fill=INK, font=ImageFont.load_default(26))
        draw.text((MARGIN + 70, y + 10), about, fill=FAINT, font=ImageFont.load_default(15))
        draw.line((MARGIN, y + 44, width - MARGIN, y + 44), fill="#ddd8cc")
        y += HEADING - 16
        for category in world.categories:
            for column, one in enumerate(first(world, category)):
                x = MARGIN + column * (CELL + GAP)
                sheet.paste(Image.fromarray(one.image).resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
                lines = "\n".join(textwrap.wrap(one.caption, 26))
                draw.multiline_text((x, y + CELL + 6), lines, fill=INK, font=ImageFont.load_default(12), spacing=2)
            y += CELL + room
        y += 16
    coarse = [min(round(level / STEP) * STEP, 255) for level in range(256)]
    sheet.point(coarse * 3).save(file, optimize=True)


def first(world: World, category: str) -> list[Sample]:
    """The first training samples of a category, none chosen."""
    samples = (sample(0, index, world) for index in count())
    return list(islice((one for one in samples if one.category == category), COLUMNS))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
