"""List the images of a folder with their captions: from metadata files, or from a text file beside each image.

Layout: Hugging Face's "imagefolder" (``datasets/packaged_modules/folder_based_builder``): a ``metadata.jsonl``,
``.csv`` or ``.parquet`` in the folder or in one below, whose ``file_name`` is relative to it; and the sidecars of
kohya's sd-scripts (``a.txt`` or ``a.caption`` beside ``a.png``).
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gobelin.errors import DataError
from gobelin.validation import nearest, shown

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".tga"),
)
METADATA = "metadata.jsonl"
METADATA_NAMES = (METADATA, "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Columns of metadata that are looked for where none is named; the first that the file has is taken."""
NOT_LISTED = "not listed in"
"""How the reason begins for images that metadata does not name, which may be no one's mistake."""
# Images by their suffix that Pillow does not open; a folder's other files are no images.
_OTHER_IMAGES = (".heic", ".heif", ".jxl", ".svg", ".psd", ".xcf", ".raw", ".cr2", ".nef", ".arw", ".dng", ".mp4")
_SIDECARS = (".txt", ".caption")
_EXAMPLE = 'an object like {"file_name": "a.png", "text": "a cat"}'
_MAX_CAPTION = 10_000  # characters


@dataclass(frozen=True, kw_only=True)
class CaptionedFile:
    """An image file and its captions, one or several, with runs of white space made one space."""

    file: Path
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SkippedImage:
    """An image that cannot be used, and the reason; ``name`` is relative to the folder."""

    name: str
    reason: str


def list_captioned_files(folder: Path, column: str | None = None) -> tuple[list[CaptionedFile], list[SkippedImage]]:
    """List the images of a folder and of those below it that have captions, and those that have not, with the reason.

    Metadata counts for the files of its folder and of those below that have none of their own. Images come in the order
    of their metadata, else by name. Hidden files and folders are passed over, and links to folders are not followed.
    ``column`` is that of the captions; None takes the first of :data:`CAPTION_COLUMNS`. Raises :class:`DataError` that
    names the line for metadata that cannot be read, and for captions that are no text.
    """
    listing = _Listing(folder, column)
    listing.walk(folder, governed=None)
    return listing.files, listing.skipped


class _Listing:
    """The images found so far, and the metadata that was read."""

    def __init__(self, folder: Path, column: str | None):
        self.folder, self.column = folder, column
        self.files: list[CaptionedFile] = []
        self.skipped: list[SkippedImage] = []
        self._listed: set[Path] = set()

    def walk(self, folder: Path, governed: Path | None) -> None:
        """List a folder and those below; ``governed`` is the metadata file that counts for it, if there is one."""
        with os.scandir(folder) as found:
            entries = sorted((one for one in found if not _is_hidden(one.name)), key=lambda one: one.name)
        metadata = [folder / one.name for one in entries if one.name in METADATA_NAMES]
        if len(metadata) > 1:
            raise DataError(f"{folder} has {metadata[0].name} and {metadata[1].name}: keep one")
        if metadata:
            governed = metadata[0]
            self._read_metadata(governed)
        for entry in entries:
            file = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                self.walk(file, governed)
            elif file.suffix.lower() in (*IMAGE_SUFFIXES, *_OTHER_IMAGES) and file not in self._listed:
                self._take_unlisted(file, governed)

    def skip(self, file: Path, reason: str) -> None:
        """Add an image to those that cannot be used."""
        self.skipped.append(SkippedImage(name=os.path.relpath(file, self.folder).replace(os.sep, "/"), reason=reason))

    def _take_unlisted(self, file: Path, governed: Path | None) -> None:
        """Take an image that no metadata names."""
        if file.suffix.lower() in _OTHER_IMAGES:
            self.skip(file, f"{file.suffix.lower()} is not one of {' '.join(IMAGE_SUFFIXES)}")
        elif file.is_symlink() and not file.exists():
            self.skip(file, f"a link to {file.readlink()}, which is not there")
        elif not file.is_file():
            return  # a folder with an image's suffix, or no file
        elif governed is not None:
            self.skip(file, f"{NOT_LISTED} {os.path.relpath(governed, self.folder)}")
        else:
            self._take(file, *_read_sidecar(file))

    def _take(self, file: Path, captions: tuple[str, ...], reason: str = "no caption") -> None:
        """Take an image with its captions; without any it is skipped for the reason."""
        clean = tuple(text for caption in captions if (text := " ".join(caption.split())))
        if odd := next((problem for text in clean if (problem := _problem(text))), ""):
            self.skip(file, odd)
        elif clean:
            self.files.append(CaptionedFile(file=file, captions=clean))
        else:
            self.skip(file, reason)

    def _read_metadata(self, metadata: Path) -> None:
        inside = self.folder.resolve()
        for where, entry in _entries(metadata):
            name = entry.get("file_name")
            if not isinstance(name, str) or not name:
                raise DataError(
                    f'{where}: expected a "file_name" and a "text", as in {_EXAMPLE}; '
                    f"it has {shown(', '.join(map(str, entry)) or 'nothing')}"
                )
            file = metadata.parent / name
            if "\0" in name or not _lexically(file).is_relative_to(inside):
                raise DataError(f"{where}: {shown(name)} lies outside the folder")
            if file in self._listed:
                raise DataError(f"{where}: {shown(name)} is listed a second time: give several captions as a list")
            self._listed.add(file)
            beside = [value for key, value in entry.items() if key.endswith("_file_name") and key != "file_name"]
            self._listed.update(
                metadata.parent / name for name in beside if isinstance(name, str)
            )  # masks and the like
            self._take(file, _captions(entry, self._column_of(entry, where), where))

    def _column_of(self, entry: dict[str, Any], where: str) -> str:
        """Find the column of the captions in an entry."""
        found = [self.column] if self.column else [name for name in CAPTION_COLUMNS if name in entry]
        if not found or found[0] not in entry:
            columns = [name for name in entry if name != "file_name"]
            expected = repr(self.column) if self.column else " or ".join(map(repr, CAPTION_COLUMNS))
            hint = f": {nearest(self.column, columns)}" if self.column and columns else ""
            raise DataError(
                f"{where} has no {expected} for the caption; it has {shown(', '.join(map(str, entry)))}"
                + (hint or ": name the column of the captions")
            )
        return found[0]


def _entries(metadata: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read (where it stands, entry) of a metadata file."""
    if metadata.suffix == ".parquet":
        yield from _parquet_entries(metadata)
        return
    try:
        text = metadata.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{metadata} is not UTF-8 text: {error}") from error
    if metadata.suffix == ".csv":
        yield from _csv_entries(metadata, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({error}): expected an object on each line") from error
        if not isinstance(entry, dict):
            raise DataError(f"{where} is {shown(entry)}: expected {_EXAMPLE}")
        yield where, entry


def _csv_entries(metadata: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in rows:
            where = f"{metadata}, line {rows.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where} has other columns than {shown(', '.join(rows.fieldnames or ()))}")
            yield where, dict(row)
    except csv.Error as error:
        raise DataError(f"{metadata}, line {rows.line_num}, is not CSV: {error}") from error


def _parquet_entries(metadata: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"to read {metadata}, pip install 'gobelin[parquet]'") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(metadata).iter_batches():
            for entry in batch.to_pylist():
                number += 1
                yield f"{metadata}, row {number}", entry
    except (ArrowException, OSError) as error:
        raise DataError(f"{metadata} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _captions(entry: dict[str, Any], column: str, where: str) -> tuple[str, ...]:
    """Return the captions of an entry: a text, or a list of them; none where the value is null."""
    value = entry[column]
    if value is None or isinstance(value, str):
        return (value or "",)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise DataError(f"{where}: {column!r} is {shown(value)}, expected a caption, or a list of captions")


def _read_sidecar(file: Path) -> tuple[tuple[str, ...], str]:
    """Read the caption beside an image: (captions, the reason where there is none)."""
    names = [f"{start}{suffix}" for start in (file.stem, file.name) for suffix in _SIDECARS]
    names += [f"{file.stem}{suffix.upper()}" for suffix in _SIDECARS]
    sidecar = next((path for name in names if (path := file.with_name(name)).is_file()), None)
    if sidecar is None:
        return (), f"no caption (looked for {names[0]}, {names[1]} and {names[2]})"
    try:
        return (sidecar.read_text(encoding="utf-8-sig"),), f"{sidecar.name} is empty"
    except UnicodeDecodeError:
        return (), f"{sidecar.name} is not UTF-8 text"


def _problem(caption: str) -> str:
    """Say why a caption cannot be learned; an empty string if it can."""
    if len(caption) > _MAX_CAPTION:
        return f"a caption of {len(caption):,} characters, more than {_MAX_CAPTION:,}"
    if "\0" in caption:
        return "a caption with a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in caption):
        return "a caption with half a character"
    return ""


def _is_hidden(name: str) -> bool:
    """Recognise hidden files and folders, and what macOS packs beside the files of an archive."""
    return name.startswith(".") or name == "__MACOSX"


def _lexically(file: Path) -> Path:
    """Resolve ``..`` in a path, and links in its folder alone: a link to an image elsewhere is its owner's own."""
    return file.parent.resolve() / file.name
