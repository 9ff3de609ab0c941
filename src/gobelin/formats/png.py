"""PNG files with the settings of their images in text chunks: as Gobelin's JSON, and in AUTOMATIC1111's form."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gobelin.errors import DataError, ModelError
from gobelin.formats.files import parse_json, replacing
from gobelin.formats.generation_info.a1111 import format_a1111_parameters
from gobelin.formats.generation_info.image_texts import GOBELIN_KEY, PARAMETERS, read_image_texts


def write_png(file: Path, image: Image.Image, settings: dict[str, Any] | None = None) -> None:
    """Write a PNG atomically, with its settings (if any) as :func:`encode_png` stores them."""
    content = encode_png(image, settings)
    with replacing(file) as temporary:
        temporary.write_bytes(content)


def encode_png(image: Image.Image, settings: dict[str, Any] | None = None) -> bytes:
    """Encode a PNG with its settings (if any) twice: as our JSON, and in AUTOMATIC1111's form."""
    info = PngInfo()
    if settings is not None:
        info.add_text(PARAMETERS, format_a1111_parameters(settings))
        info.add_text(GOBELIN_KEY, json.dumps(settings, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_png_settings(file: Path) -> dict[str, Any]:
    """Read the settings that :func:`write_png` stored in an image; raises :class:`DataError` where there are none."""
    text = read_image_texts(file).get(GOBELIN_KEY)
    if text is None:
        raise DataError(f"{file} carries no settings of Gobelin: give a PNG that Gobelin saved")
    try:
        return parse_json(text, f"{file}: its stored settings")
    except ModelError as error:
        raise DataError(str(error)) from error
