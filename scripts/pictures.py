"""Paint the picture at the top of the README with the shipped model: python scripts/pictures.py docs/pictures.png"""

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gobelin import Pipeline

PROMPTS = [
    "a red circle",
    "a black square",
    "a yellow ring",
    "a green triangle",
    "a yellow cross",
    "the black circle",
    "there is a blue ring",
    "a green cross and nothing else",
    "an image of a red square",
    "a purple triangle",
    "a red circle to the left of a yellow square",
    "a green ring above a black cross",
]
COLUMNS, CELL, MARGIN, CAPTION = 6, 160, 16, 40


def main(file: Path) -> None:
    """One picture a prompt, seeds in order, none chosen."""
    pictures = Pipeline.from_pretrained()(PROMPTS, seed=0).images
    rows = -(-len(PROMPTS) // COLUMNS)
    size = (MARGIN + COLUMNS * (CELL + MARGIN), MARGIN + rows * (CELL + CAPTION + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True)):
        x = MARGIN + index % COLUMNS * (CELL + MARGIN)
        y = MARGIN + index // COLUMNS * (CELL + CAPTION + MARGIN)
        sheet.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x, y + CELL + 6), "\n".join(textwrap.wrap(prompt, 24)), fill="#333333", font=font)
    sheet.save(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
