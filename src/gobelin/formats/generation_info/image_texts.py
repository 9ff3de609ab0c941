"""Texts of images: what programs wrote into a PNG's text chunks, EXIF, XMP, a JPEG's comment, or the pixels' last bits.

Layouts: EXIF's UserComment as piexif (``helper.py``) and ImageSharp write it; tags Make and Model as ComfyUI's
``SaveAnimatedWEBP`` (``comfy_extras/nodes_images.py``); hidden text as NovelAI's ``nai_meta.py`` and
``sd-webui-stealth-pnginfo``.
"""

import html
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gobelin.errors import DataError
from gobelin.images import UNREADABLE, readable_size

GOBELIN_KEY = "gobelin"
"""Keyword of Gobelin's own text chunk."""
PARAMETERS = "parameters"
"""Keyword of AUTOMATIC1111's text; an EXIF UserComment and hidden text, which have none, are under it too."""
XMP_COMMENT = "exif:UserComment"
"""Keyword of an XMP's UserComment."""
MAX_TEXT = 8_000_000
"""Characters of one text that are read: JSON of so many is parsed in a fraction of a second."""

# Keywords that some program writes: only an image without any is searched for text after or in its pixels.
_TELLING = (
    "gobelin",
    PARAMETERS,
    XMP_COMMENT,
    "prompt",
    "Prompt",
    "Comment",
    "invokeai_metadata",
    "sd-metadata",
    "Dream",
)
_USER_COMMENT, _SOFTWARE, _MAKER_NOTE, _EXIF_IFD = 0x9286, 0x0131, 0x927C, 0x8769
_COMFYUI_TAGS = range(0x0100, 0x0111)  # Model, and from Make downward
_MODEL = 0x0110
_NAMED_JSON = re.compile(r"([A-Za-z_]{1,40}): ?(?=\{)")
_FOOOCUS_SCHEMES = ("fooocus", "a1111")
_BROKEN_EXIF = (*UNREADABLE, struct.error, KeyError, IndexError, TypeError, AttributeError, OverflowError, EOFError)
_STEALTH = {  # by their magic bytes: whether in alpha, whether compressed
    b"stealth_pnginfo": (True, False),
    b"stealth_pngcomp": (True, True),
    b"stealth_rgbinfo": (False, False),
    b"stealth_rgbcomp": (False, True),
}
_BYTE_ORDER_MARK = "\ufeff"
_MAGIC = 15  # bytes; four of the length in bits follow


def read_image_texts(file: Path) -> dict[str, str]:
    """Read the texts in an image, by their keywords.

    Raises :class:`DataError` for no image, one of too many pixels, and text that cannot be decoded.
    """
    if not file.is_file():
        raise DataError(f"there is no image at {file}: give the path of one")
    readable_size(file)
    try:
        with Image.open(file) as image:
            texts = _texts(image)
            if not any(name in texts for name in _TELLING):
                image.load()  # chunks may come after the pixels
                texts = _texts(image) or texts
                if not any(name in texts for name in _TELLING):
                    texts |= _hidden_text(image)
    except UNREADABLE as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    except _UndecodableError as error:
        raise DataError(
            f"{file} holds {error} that cannot be decoded: give the image as its program saved it"
        ) from error
    return texts


class _UndecodableError(Exception):
    """Text that is in none of the encodings that it may be in."""


def _texts(image: Image.Image) -> dict[str, str]:
    texts = {str(name): str(text) for name, text in image.info.items() if isinstance(text, str)}
    if isinstance(comment := image.info.get("comment"), bytes):
        texts.setdefault("Comment", comment.decode("utf-8", "replace").strip("\0"))
    for name, text in _exif_texts(image).items():
        texts.setdefault(name, text)
    xmp = image.info.get("xmp", texts.get("XML:com.adobe.xmp", ""))
    if text := _xmp_comment(xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp)):
        texts[XMP_COMMENT] = text
    return {name: text.lstrip(_BYTE_ORDER_MARK) for name, text in texts.items()}


def _exif_texts(image: Image.Image) -> dict[str, str]:
    """Read the texts in EXIF; none of it where it is broken, as a camera's is at times."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return {}  # Pillow would decode the pixels to look for it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of EXIF that is cut off
            exif = image.getexif()
            tags: dict[int, Any] = dict(exif)
            tags |= dict(exif.get_ifd(_EXIF_IFD))
    except _BROKEN_EXIF:
        return {}
    texts: dict[str, str] = {}
    for tag in _COMFYUI_TAGS:
        if isinstance(value := tags.get(tag), str):
            value = _in_utf8(value)
            if found := _NAMED_JSON.match(value):
                texts[found[1].lower()] = value[found.end() :].strip("\0")
            elif tag == _MODEL and value.startswith("{"):
                texts[PARAMETERS] = value.strip("\0")  # SwarmUI's first form
    if isinstance(comment := tags.get(_USER_COMMENT), bytes | str):
        text = _in_utf8(comment) if isinstance(comment, str) else _decode_comment(comment)
        if text.strip("\0 \n"):
            texts[PARAMETERS] = text.strip("\0")
    if isinstance(software := tags.get(_SOFTWARE), str):
        texts["Software"] = software
    note = tags.get(_MAKER_NOTE)
    scheme = note.decode("latin-1") if isinstance(note, bytes) else str(note)
    if scheme.strip("\0") in _FOOOCUS_SCHEMES:
        texts["fooocus_scheme"] = scheme.strip("\0")
    return texts


def _in_utf8(text: str) -> str:
    """Undo Pillow's reading of ASCII tags as Latin-1, where programs wrote UTF-8."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _decode_comment(comment: bytes) -> str:
    """Decode an EXIF UserComment by the charset that its first eight bytes name, or as UTF-8 where they name none."""
    charset, body = comment[:8], comment[8:]
    try:
        if charset == b"UNICODE\0":
            return _decode_utf16(body)
        if charset.rstrip(b"\0 ") in (b"ASCII", b""):
            return body.decode("utf-8")
        if charset.startswith(b"JIS\0"):
            return body.decode("iso2022_jp")
        return comment.decode("utf-8")
    except UnicodeError as error:
        raise _UndecodableError("an EXIF comment") from error


def _decode_utf16(body: bytes) -> str:
    """Decode UTF-16 of either byte order: as its mark says, or else by where the zeros of its ASCII characters are."""
    body = body[: len(body) // 2 * 2]
    if body.startswith((b"\xff\xfe", b"\xfe\xff")):  # a second mark goes with the text's first character
        return body.decode("utf-16")
    little = body[1::2].count(0) > body[0::2].count(0)
    return body.decode("utf-16-le" if little else "utf-16-be")


def _xmp_comment(xmp: str) -> str:
    """Find the UserComment in an XMP, without parsing XML: no entity of its own is ever expanded."""
    opened = xmp.find(f"<{XMP_COMMENT}")
    closed = xmp.find(f"</{XMP_COMMENT}>", opened)
    if 0 <= opened < closed:
        inner, _, _ = xmp[xmp.find(">", opened) + 1 : closed].partition("</rdf:li>")  # the first of several languages
        if found := re.search(r"<!\[CDATA\[(.*?)\]\]>", inner, re.S):
            return found[1].strip()
        return html.unescape(re.sub(r"<[^<>]*>", "", inner)).strip()
    for quote in "\"'":
        _, begins, after = xmp.partition(f"{XMP_COMMENT}={quote}")
        if begins:
            return html.unescape(after.partition(quote)[0]).strip()
    return ""


def _hidden_text(image: Image.Image) -> dict[str, str]:
    """Read the text in the last bits of alpha, or of red, green and blue, column by column, if there is one."""
    if image.mode not in ("RGB", "RGBA"):
        return {}
    levels = np.asarray(image).transpose(1, 0, 2)  # [x, y, channel]
    head = -(-(_MAGIC + 4) * 8 // levels.shape[1])  # columns
    for magic, (in_alpha, compressed) in _STEALTH.items():
        channels = slice(3, 4) if in_alpha else slice(0, 3)
        start = np.packbits(levels[:head, :, channels].ravel() & 1).tobytes()
        if not start.startswith(magic) or len(start) < _MAGIC + 4:
            continue
        length = int.from_bytes(start[_MAGIC : _MAGIC + 4], "big") // 8
        payload = np.packbits(levels[..., channels].ravel() & 1).tobytes()[_MAGIC + 4 :][:length]
        try:
            text = zlib.decompressobj(31).decompress(payload, MAX_TEXT + 1) if compressed else payload
            return {PARAMETERS: text.decode("utf-8")}
        except (zlib.error, UnicodeError) as error:
            raise _UndecodableError("text hidden in its pixels") from error
    return {}
