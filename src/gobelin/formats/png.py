"""Pictures that remember how they were made: settings in a PNG's text chunks."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gobelin.errors import DataError
from gobelin.formats.files import replacing

KEY = "gobelin"
A1111_KEY = "parameters"


def write_png(file: Path, image: Image.Image, settings: dict[str, Any]) -> None:
    """Write a PNG with its settings twice: our JSON, and the text that AUTOMATIC1111's web UI writes."""
    info = PngInfo()
    info.add_text(A1111_KEY, a1111_parameters(settings))
    info.add_text(KEY, json.dumps(settings, ensure_ascii=False))
    with replacing(file) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_picture(file: Path, image: Image.Image) -> None:
    """Write a PNG that carries nothing but itself: the whole of it, or nothing."""
    with replacing(file) as temporary:
        image.save(temporary, format="PNG")


def read_png_settings(file: Path) -> dict[str, Any]:
    """The settings that :func:`write_png` put into a picture; :class:`DataError` where there are none."""
    try:
        with Image.open(file) as image:
            text = image.info.get(KEY)
    except OSError as error:
        raise DataError(f"{file} cannot be read as a picture: {error}") from error
    if text is None:
        raise DataError(f"{file} carries no settings of Gobelin's")
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{file}: its settings are damaged ({error})") from error


def a1111_parameters(settings: dict[str, Any]) -> str:
    """The settings as AUTOMATIC1111's web UI writes them under ``parameters``."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    fields = {
        "Steps": settings["steps"],
        "Sampler": settings["sampler"],
        "CFG scale": settings["guidance"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["model"],
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)
