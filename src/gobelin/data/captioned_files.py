"""List the images of a folder with their captions: from metadata files, or from a text file beside each image.

Layout: Hugging Face's "imagefolder" (``datasets/packaged_modules/folder_based_builder``): a ``metadata.jsonl``,
``.csv`` or ``.parquet`` in the folder or in one below, whose ``file_name`` is relative to it; and the sidecars of
kohya's sd-scripts and of img2dataset (``a.txt``, ``a.caption`` or ``a.json`` beside ``a.png``).
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Set
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
TEXT_SUFFIXES = (".txt", ".caption")
"""Suffixes of a caption beside an image; a ``.json`` may be one too."""
NO_CAPTION = "no caption"
NOT_LISTED = "not listed in"
"""How the reason begins for images that metadata does not name, which may be no one's mistake."""
NO_IMAGE_BESIDE = "a text without an image beside it"
SECOND_IMAGE = "not the image of its sample"
MAX_SIDECAR = 4_000_000  # bytes; img2dataset's .json has the EXIF of an image in it
# Images by their suffix that Pillow does not open; a folder's other files are no images.
_OTHER_IMAGES = (".heic", ".heif", ".jxl", ".svg", ".psd", ".xcf", ".raw", ".cr2", ".nef", ".arw", ".dng", ".mp4")
_ALL_IMAGES = frozenset((*IMAGE_SUFFIXES, *_OTHER_IMAGES))
_EXAMPLE = 'an object like {"file_name": "a.png", "text": "a cat"}'
_MAX_CAPTION = 10_000  # characters


@dataclass(frozen=True, kw_only=True)
class CaptionedFile:
    """An image file and its captions, one or several, with runs of white space made one space."""

    file: Path
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SkippedImage:
    """An image that cannot be used, and the reason; ``name`` is relative to the data set."""

    name: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without what is said of this image alone, to count by."""
        return self.reason.partition(" (")[0]


def iterate_captioned_files(folder: Path, column: str | None = None) -> Iterator[CaptionedFile | SkippedImage]:
    """Find the images of a folder and of those below it that have captions, and those that have not, with the reason.

    Metadata counts for the files of its folder and of those below that have none of their own. Images come in the order
    of their metadata, else by name. Hidden files and folders are passed over, and links to folders are not followed.
    ``column`` is that of the captions; None takes the first of :data:`CAPTION_COLUMNS`. Of the names, 16 bytes of those
    in metadata are kept, and one folder's at a time. Raises :class:`DataError` that names the line for metadata that
    cannot be read, and for captions that are no text.
    """
    return _Listing(folder, column).walk(folder, governed=None)


class _Listing:
    """The metadata that was read, as the keys of what it names."""

    def __init__(self, folder: Path, column: str | None):
        self.folder, self.column = folder, column
        self._listed: set[bytes] = set()
        self._inside = folder.resolve()
        self._resolved: dict[Path, Path] = {}
        self._walked: set[Path] = set()

    def walk(self, folder: Path, governed: Path | None) -> Iterator[CaptionedFile | SkippedImage]:
        """List a folder and those below; ``governed`` is the metadata file that counts for it, if there is one."""
        try:
            with os.scandir(folder) as found:
                entries = sorted((one for one in found if not is_hidden(one.name)), key=lambda one: one.name)
        except OSError as error:
            raise unlisted(error) from error
        metadata = [folder / one.name for one in entries if one.name in METADATA_NAMES]
        if len(metadata) > 1:
            raise DataError(f"{folder} has {metadata[0].name} and {metadata[1].name}: keep one")
        if metadata:
            governed = metadata[0]
            yield from self._read_metadata(governed)
        self._walked.add(folder)
        beside = {one.name for one in entries}
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from self.walk(folder / entry.name, governed)
            elif _suffix(entry.name) in _ALL_IMAGES and not self._is_listed(folder / entry.name):
                yield from self._unlisted(entry, folder / entry.name, governed, beside)
        if governed is None:
            yield from self._texts_alone(folder, [one.name for one in entries if not one.is_dir()])

    def _skipped(self, file: Path, reason: str) -> SkippedImage:
        return SkippedImage(name=os.path.relpath(file, self.folder).replace(os.sep, "/"), reason=reason)

    def _is_listed(self, file: Path) -> bool:
        """Tell whether metadata names a file."""
        return bool(self._listed) and _key(file) in self._listed

    def _unlisted(
        self, entry: os.DirEntry[str], file: Path, governed: Path | None, beside: Set[str]
    ) -> Iterator[CaptionedFile | SkippedImage]:
        """Take an image that no metadata names."""
        if _suffix(entry.name) in _OTHER_IMAGES:
            yield self._skipped(file, f"{_suffix(entry.name)} is not one of {' '.join(IMAGE_SUFFIXES)}")
        elif entry.is_symlink() and not file.exists():
            yield self._skipped(file, broken_link(file))
        elif not entry.is_file():
            return  # a folder with an image's suffix, or no file
        elif governed is not None:
            yield self._skipped(file, f"{NOT_LISTED} {os.path.relpath(governed, self.folder)}")
        else:
            yield self._taken(file, *_read_sidecar(file, self.column, beside))

    def _texts_alone(self, folder: Path, names: list[str]) -> Iterator[SkippedImage]:
        """Name the captions that have no image, of a failed download perhaps."""
        images = {part for name in names if _suffix(name) in _ALL_IMAGES for part in (name, _stem(name))}
        for name in names if images else ():
            if _suffix(name) in TEXT_SUFFIXES and _stem(name) not in images:
                yield self._skipped(folder / name, NO_IMAGE_BESIDE)

    def _taken(self, file: Path, captions: tuple[str, ...], reason: str = NO_CAPTION) -> CaptionedFile | SkippedImage:
        """Take an image with its captions; without any it is skipped for the reason."""
        clean, reason = clean_captions(captions, reason)
        return CaptionedFile(file=file, captions=clean) if clean else self._skipped(file, reason)

    def _read_metadata(self, metadata: Path) -> Iterator[CaptionedFile | SkippedImage]:
        for where, entry in _entries(metadata):
            name = entry.get("file_name")
            if not isinstance(name, str) or not name:
                raise DataError(
                    f'{where}: expected a "file_name" and a "text", as in {_EXAMPLE}; '
                    f"it has {shown(', '.join(map(str, entry)) or 'nothing')}"
                )
            file = self._named(metadata, name, where)
            if _key(file) in self._listed:
                raise DataError(f"{where}: {shown(name)} is listed a second time: give several captions as a list")
            self._listed.add(_key(file))
            beside = [value for key, value in entry.items() if key.endswith("_file_name")]  # masks and the like
            self._listed.update(_key(metadata.parent / name) for name in beside if isinstance(name, str))
            yield self._taken(file, _captions(entry, self._column_of(entry, where), where))

    def _named(self, metadata: Path, name: str, where: str) -> Path:
        """Find the file that metadata names, in the folder; a link to an image elsewhere is its owner's own."""
        if "\0" not in name:
            file = self.folder / os.path.relpath(metadata.parent / name, self.folder)
            if file.parent not in self._resolved:
                self._resolved[file.parent] = file.parent.resolve()
            if file.parent in self._walked:
                raise DataError(
                    f"{where}: {shown(name)} was listed before this file was read: move it up to that folder"
                )
            if self._resolved[file.parent].is_relative_to(self._inside):
                return file
        raise DataError(f"{where}: {shown(name)} lies outside the folder")

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
        with metadata.open(encoding="utf-8-sig", newline="" if metadata.suffix == ".csv" else "\n") as lines:
            yield from (_csv_entries if metadata.suffix == ".csv" else _json_entries)(metadata, lines)
    except UnicodeDecodeError as error:
        raise DataError(f"{metadata} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise DataError(f"{metadata} cannot be read: {error.strerror or error}") from error


def _json_entries(metadata: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
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


def _csv_entries(metadata: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.DictReader(lines, strict=True)
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


def _read_sidecar(file: Path, column: str | None, beside: Set[str]) -> tuple[tuple[str, ...], str]:
    """Read the caption beside an image: (captions, the reason where there is none)."""
    own, stem = file.name, _stem(file.name)
    names = (
        name
        for suffix in sidecar_suffixes(column)
        for name in (f"{stem}{suffix}", f"{own}{suffix}", f"{stem}{suffix.upper()}")
    )
    found = next((name for name in names if name in beside), None)
    if found is None:
        looked_for = f"{stem}.json" if column else f"{stem}.txt, {stem}.caption, {stem}.json and {own}.txt"
        return (), f"{NO_CAPTION} (looked for {looked_for})"
    try:
        with file.with_name(found).open("rb") as opened:
            return read_captions(found, opened.read(MAX_SIDECAR + 1), column)
    except OSError as error:
        return (), f"its caption cannot be read ({found}: {error.strerror})"


def sidecar_suffixes(column: str | None) -> tuple[str, ...]:
    """Order the suffixes of captions beside an image: texts first; where a ``column`` is named, JSON alone has it."""
    return (".json",) if column else (*TEXT_SUFFIXES, ".json")


def read_captions(name: str, content: bytes, column: str | None) -> tuple[tuple[str, ...], str]:
    """Read the bytes of a text, or of a ``.json`` as img2dataset writes: (captions, the reason where there is none)."""
    if len(content) > MAX_SIDECAR:
        return (), f"its caption file has more than {MAX_SIDECAR:,} bytes ({name})"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return (), f"its caption is not UTF-8 text ({name})"
    if _suffix(name) != ".json":
        return (text,), f"its caption is empty ({name})"
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return (), f"its caption is not JSON ({name})"
    columns = [column] if column else CAPTION_COLUMNS
    found = next((one for one in columns if one in entry), None) if isinstance(entry, dict) else None
    if found is None:
        return (), f"no {' or '.join(map(repr, columns))} in its JSON ({name})"
    try:
        return _captions(entry, found, name), f"its caption is empty ({name})"
    except DataError:
        return (), f"its caption is no text ({name})"


def clean_captions(captions: tuple[str, ...], reason: str) -> tuple[tuple[str, ...], str]:
    """Make runs of white space one space: (captions, the reason where there is none that can be learned)."""
    clean = tuple(text for caption in captions if (text := " ".join(caption.split())))
    odd = next((problem for text in clean if (problem := _problem(text))), "")
    return ((), odd) if odd else (clean, reason)


def unlisted(error: OSError) -> DataError:
    """Make the error for a folder that cannot be listed, in which images may be."""
    return DataError(f"{error.filename} cannot be listed ({error.strerror}): its images would be left out")


def is_besides(reason: str) -> bool:
    """Recognise the reasons that may be no one's mistake: a mask, a preview, a text about the folder."""
    return reason.startswith((NOT_LISTED, NO_IMAGE_BESIDE, SECOND_IMAGE))


def broken_link(file: Path) -> str:
    """Give the reason for a link to a file that is not there."""
    return f"a link to a file that is not there ({file.readlink()})"


def legible(text: str) -> str:
    """Write a file's name on one line, in characters that every terminal and file takes."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _problem(caption: str) -> str:
    """Say why a caption cannot be learned; an empty string if it can."""
    if len(caption) > _MAX_CAPTION:
        return f"a caption of more than {_MAX_CAPTION:,} characters ({len(caption):,})"
    if "\0" in caption:
        return "a caption with a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in caption):
        return "a caption with half a character"
    return ""


def is_hidden(name: str) -> bool:
    """Recognise hidden files and folders, and what macOS packs beside the files of an archive."""
    return name.startswith(".") or name == "__MACOSX"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _key(file: Path) -> bytes:
    """Hash where a file is, the same for ``a/../b.png`` and ``b.png``; of 10 million no two are the same."""
    return hashlib.blake2b(os.path.normpath(file).encode("utf-8", "surrogatepass"), digest_size=16).digest()
