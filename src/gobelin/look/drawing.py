"""What every sheet is drawn with: colours, a font, and text in lines."""

from PIL import Image, ImageDraw, ImageFont

INK, PALE, LINEN, RED, PAPER = "#1f2328", "#6b7280", "#d8d5cc", "#d62728", "#fbfaf7"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def font(size: int) -> Font:
    """The sheets' font; ``size`` in pixels."""
    return ImageFont.load_default(size)


def wrapped(text: str, width: float, size: int, lines: int) -> list[str]:
    """Text in lines of at most ``width`` pixels, the end left out where there are more than ``lines``."""
    broken = [""]
    for word in text.split():
        longer = f"{broken[-1]} {word}".lstrip()
        if not broken[-1] or font(size).getlength(longer) <= width:
            broken[-1] = longer
        else:
            broken.append(word)
    return broken if len(broken) <= lines else [*broken[: lines - 1], f"{broken[lines - 1]} …"]


def framed(sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image, x: int, y: int) -> None:
    """Put a picture on a sheet with a thin line around it."""
    draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), fill=LINEN)
    sheet.paste(picture, (x, y))
