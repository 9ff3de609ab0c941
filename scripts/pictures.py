"""Paint a sheet of captioned pictures with the shipped model, seeds in order, none chosen.

python scripts/pictures.py docs/pictures.png                        # the picture at the top of the README
python scripts/pictures.py docs/free-form.png docs/free-form.txt    # prompts written by hand, a line each
"""

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gobelin import Pipeline

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
CELL, MARGIN, CAPTION = 160, 16, 40


def main(file: Path, prompts: list[str]) -> None:
    """One picture a prompt, in rows of six, or of ten where there are many."""
    pictures = Pipeline.from_pretrained()(prompts, seed=0).images
    columns = 6 if len(prompts) <= 24 else 10
    rows = -(-len(prompts) // columns)
    size = (MARGIN + columns * (CELL + MARGIN), MARGIN + rows * (CELL + CAPTION + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x = MARGIN + index % columns * (CELL + MARGIN)
        y = MARGIN + index // columns * (CELL + CAPTION + MARGIN)
        sheet.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x, y + CELL + 6), "\n".join(textwrap.wrap(prompt, 24)), fill="#333333", font=font)
    sheet.save(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).read_text().splitlines() if len(sys.argv) > 2 else PROMPTS)
