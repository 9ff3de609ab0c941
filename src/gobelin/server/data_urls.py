"""Images in JSON: ``data:`` URLs to bytes and PIL images, with limits; never addresses or paths."""

import base64
import binascii
import io
import re
from dataclasses import dataclass, field

from PIL import Image

from gobelin.errors import UsageError
from gobelin.images import UNREADABLE

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_HEADER = re.compile(r"data:image/(png|jpeg|jpg|webp|gif|bmp|x-ms-bmp);base64,")
_MOST_HEADER = 40  # characters


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image as it came in: ``content`` is its file, decoded each time that it is opened, so that little waits."""

    content: bytes = field(repr=False)
    name: str
    most_pixels: int

    def open(self) -> Image.Image:
        """Open the image; raises :class:`UsageError` for what is none, or has too many pixels."""
        try:
            opened = Image.open(io.BytesIO(self.content), formats=_FORMATS)
        except UNREADABLE:
            raise UsageError(f"{self.name} cannot be read as an image: give a PNG, JPEG, WebP, GIF or BMP") from None
        if opened.width * opened.height > self.most_pixels:
            raise UsageError(
                f"{self.name} has {opened.width}×{opened.height} pixels: give {self.most_pixels:,} at most in all"
            )
        try:
            opened.load()
        except UNREADABLE:
            raise UsageError(f"{self.name} is an image that is broken or cut off: save it again") from None
        return opened


def decode_image(text: str, name: str, most_pixels: int, plain: bool = False) -> EncodedImage:
    """Decode a ``data:`` URL, or with ``plain`` base64 alone too; raises :class:`UsageError` for anything else."""
    header = _HEADER.match(text[:_MOST_HEADER])
    if header is None and (not plain or text.startswith("data:")):
        raise UsageError(f"{name} is no image in base64: give data:image/png;base64, and the file's bytes")
    try:
        content = base64.b64decode(text[header.end() if header else 0 :], validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{name} is not valid base64: give data:image/png;base64, and the file's bytes") from None
    image = EncodedImage(content=content, name=name, most_pixels=most_pixels)
    image.open().close()
    return image
