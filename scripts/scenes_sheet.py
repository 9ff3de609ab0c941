"""Draw the scenes' sheet, the first six of each kind: python scripts/scenes_sheet.py docs/scenes.png"""

import argparse
from itertools import count, islice
from pathlib import Path

from PIL import Image

from gobelin.look.contact_sheet import Tile, TileRow, captioned_grid
from gobelin.scenes import CORE, RICH, Sample, World, sample

COLUMNS, SIDE = 6, 160
STEP = 4  # between the levels that are kept: the noise makes a large file
WORLDS = (
    (CORE, "solid shapes, ten colours, up to four objects, four relations, quiet backgrounds"),
    (RICH, "and textures, sizes, named backgrounds with gradients and noise, things inside rings"),
)


def main(file: Path) -> None:
    """A heading for each world, and a row for each category below it."""
    rows = []
    for world, about in WORLDS:
        for category in world.categories:
            tiles = [Tile(image=Image.fromarray(one.image), caption=one.caption) for one in first(world, category)]
            named = category == world.categories[0]
            rows.append(TileRow(heading=world.name if named else "", note=about if named else "", tiles=tiles))
    sheet = captioned_grid(rows, columns=COLUMNS, side=SIDE, text=13)
    coarse = [min(round(level / STEP) * STEP, 255) for level in range(256)]
    sheet.point(coarse * 3).save(file, optimize=True)


def first(world: World, category: str) -> list[Sample]:
    """The first training samples of a category, none chosen."""
    samples = (sample(0, index, world) for index in count())
    return list(islice((one for one in samples if one.category == category), COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where the sheet goes")
    main(parser.parse_args().file)
