"""Recognise by its first bytes what a file is that should hold weights and does not."""

import json
from pathlib import Path

from gobelin.errors import ModelError

_HEAD = 1024  # bytes read: more than any of the marks needs, and enough of a server's answer to quote

# First bytes, and what begins with them.
_MAGIC = (
    (b"version https://git-lfs", "a pointer of Git LFS to the file, not the file: run git lfs pull, or download it"),
    (b"GGUF", "a GGUF, the quantized format of stable-diffusion.cpp: give the model as .safetensors"),
    (b"\x89PNG", "an image (PNG)"),
    (b"\xff\xd8\xff", "an image (JPEG)"),
    (b"GIF8", "an image (GIF)"),
    (b"%PDF", "a PDF"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\x89HDF", "HDF5, the format of Keras: give the model as .safetensors"),
    (b"\x93NUMPY", "an array of NumPy: give the model as .safetensors"),
    (b"ggml", "a GGML, an older quantized format: give the model as .safetensors"),
    (b"lmgg", "a GGML, an older quantized format: give the model as .safetensors"),
    (b"tjgg", "a GGML, an older quantized format: give the model as .safetensors"),
)
_PLACED_MAGIC = (
    (8, b"WEBP", "an image (WebP)"),
    (4, b"ftyp", "an image or a film (MP4, AVIF, HEIC)"),
    (4, b"TFL3", "a model of TensorFlow Lite: give the model as .safetensors"),
    (257, b"ustar", "a tar archive: unpack it first"),
)


def refuse_foreign_file(path: Path) -> None:
    """Raise :class:`ModelError` that says what ``path`` is where its first bytes are of no file of weights."""
    if what := describe_foreign_file(path):
        raise ModelError(f"{path} is {what}")


def describe_foreign_file(path: Path) -> str | None:
    """Describe a file that holds no weights, by its first bytes: what it is, and what to do; None for any other."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "empty: it has no bytes, download or copy it again"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    for place, magic, what in _PLACED_MAGIC:
        if head[place : place + len(magic)] == magic:
            return what
    if head[:1] == b"\x08" and head[2:3] == b"\x12" and head[3:4] not in (b"", b"\x00"):
        return "an ONNX model: give the model as .safetensors"  # ir_version, then producer_name (onnx.proto)
    if not head.strip(b"\x00"):
        return "zeros at its start: the download did not finish, get it again"
    return _describe_text(head)


def _describe_text(head: bytes) -> str | None:
    """Describe a text by its beginning; None where it is none."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"<":
        return (
            "a web page (HTML or XML), such as a login page or an error: download the file itself, signed in if need be"
        )
    if text[:1] in (b"{", b"["):
        said = text.decode("utf-8", "replace")
        return f"JSON, not weights{_quote_error(said)}: give the file of weights itself"
    return None


def _quote_error(text: str) -> str:
    """Quote what a server's answer says went wrong, shortly; "" where it says nothing that is known."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(content, dict):
        return ""
    said = next((content[name] for name in ("message", "error", "detail") if isinstance(content.get(name), str)), "")
    return f" (it says {said[:200]!r})" if said else ""
