"""Paint a sheet of captioned images with a model that ships, seed 0 for every prompt, none chosen.

python scripts/pictures.py docs/pictures.png                        # the images at the top of the README
python scripts/pictures.py docs/emoji.png --model emoji
python scripts/pictures.py docs/free-form.png docs/free-form.txt    # prompts written by hand, a line each
"""

import argparse
from pathlib import Path

from gobelin import Pipeline
from gobelin.checkpoint.shipped import SHIPPED_MODELS
from gobelin.look.contact_sheet import Tile, TileRow, captioned_grid

SHAPES = [
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
# Captions as gobelin data emoji has them. Of the last six training has no picture in that style.
EMOJI = [
    "cat with tears of joy, noto",
    "four leaf clover, glossy",
    "rocket, twemoji",
    "tiger face, flat",
    "pizza, blob",
    "hot beverage, noto",
    "sun with face, twemoji",
    "ghost, flat",
    "mushroom, glossy",
    "snowman, blob",
    "crab, flat",
    "watermelon, noto",
    "red heart, blob",
    "octopus, noto",
    "owl, twemoji",
    "rainbow, flat",
    "penguin, glossy",
    "robot, twemoji",
]
SIDE = 160  # pixels


def main() -> None:
    """One image a prompt, in rows of six, or of ten where there are many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the sheet to write")
    parser.add_argument("prompts", type=Path, nargs="?", help="a file of prompts")
    parser.add_argument("--model", choices=SHIPPED_MODELS, default=SHIPPED_MODELS[0])
    options = parser.parse_args()
    prompts = EMOJI if options.model == "emoji" else SHAPES
    if options.prompts is not None:
        prompts = options.prompts.read_text().splitlines()
    images = Pipeline.from_pretrained(options.model)(prompts, seed=0).images
    tiles = [Tile(image=image, caption=prompt) for prompt, image in zip(prompts, images, strict=True)]
    captioned_grid([TileRow(tiles=tiles)], columns=6 if len(prompts) <= 24 else 10, side=SIDE).save(options.file)


if __name__ == "__main__":
    main()
