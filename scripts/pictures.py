"""Paint a sheet of captioned images with the shipped model, seeds in order, none chosen.

python scripts/pictures.py docs/pictures.png                        # the images at the top of the README
python scripts/pictures.py docs/free-form.png docs/free-form.txt    # prompts written by hand, a line each
"""

import sys
from pathlib import Path

from gobelin import Pipeline
from gobelin.look.contact_sheet import Tile, TileRow, captioned_grid

PROMPTS = [
    "a red circle to the left of a blue star",
    "a yellow star above a purple ring",
    "three green rings",
    "a white cross",
    "a pink diamond below a blue circle",
    "four orange squares",
    "a blue ring and a red star",
    "two brown circles",
    "on the right of a green square is a yellow triangle",
    "a black star",
    "a yellow cross and a purple circle",
    "a white diamond over a red square",
]
SIDE = 160  # pixels


def main(file: Path, prompts: list[str]) -> None:
    """One image a prompt, in rows of six, or of ten where there are many."""
    images = Pipeline.from_pretrained()(prompts, seed=0).images
    tiles = [Tile(image=image, caption=prompt) for prompt, image in zip(prompts, images, strict=True)]
    captioned_grid([TileRow(tiles=tiles)], columns=6 if len(prompts) <= 24 else 10, side=SIDE).save(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).read_text().splitlines() if len(sys.argv) > 2 else PROMPTS)
