"""Image folder: captions from ``metadata.jsonl``, or from a ``.txt`` file beside each image."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from gobelin.data.dataset import CaptionedImage
from gobelin.errors import DataError, UsageError
from gobelin.images import MAX_IMAGE_PIXELS, UNREADABLE, open_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_SKIPPED = 0.5  # a folder with a larger share of unusable images is refused: it is likely the wrong folder
METADATA = "metadata.jsonl"


@dataclass(frozen=True, kw_only=True)
class SkippedImage:
    """An image that cannot be used, and the reason."""

    name: str
    reason: str


class ImageFolderDataset:
    """Read a folder of captioned images, with its subfolders, as Hugging Face's "imagefolder" datasets are laid out.

    Entries stand in the order of ``metadata.jsonl`` (``file_name``, ``text``) or, with ``.txt`` captions, of their
    names. Every image is opened once; unusable ones are listed in ``skipped``. Images are rotated by their EXIF
    orientation, composited on white, scaled so that the shorter side is ``size`` pixels, and cropped to the centre.
    Raises :class:`DataError` for a missing folder, broken metadata, or if less than half of the images can be used.
    """

    def __init__(self, folder: str | Path, size: int = 64):
        self.folder = Path(folder)
        self.size = size
        if not self.folder.is_dir():
            raise DataError(f"no folder at {self.folder}: expected images with captions there")
        self.skipped: list[SkippedImage] = []
        self._files: list[Path] = []
        self._captions: list[str] = []
        for file, caption in self._listed():
            reason = "no caption" if not caption.strip() else unreadable(file)
            if reason:
                name = file.resolve().relative_to(self.folder.resolve()).as_posix()
                self.skipped.append(SkippedImage(name=name, reason=reason))
            else:
                self._files.append(file)
                self._captions.append(" ".join(caption.split()))
        self._refuse_if_mostly_unusable()

    @property
    def description(self) -> str:
        """One line for people: the number of images, the folder, and the first skipped files."""
        text = f"{len(self):,} captioned images in {self.folder}"
        if self.skipped:
            first = ", ".join(f"{skip.name} ({skip.reason})" for skip in self.skipped[:5])
            more = f" and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
            text += f"; skipped {len(self.skipped)}: {first}{more}"
        return text

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> CaptionedImage:
        return CaptionedImage(image=read_image(self._files[index], self.size), caption=self._captions[index])

    def _listed(self) -> Iterator[tuple[Path, str]]:
        """List (image file, caption); the caption is empty if there is none."""
        metadata = self.folder / METADATA
        if metadata.is_file():
            yield from self._from_metadata(metadata)
            return
        for file in sorted(self.folder.rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file():
                sidecar = file.with_suffix(".txt")
                text = sidecar.read_text(encoding="utf-8", errors="replace") if sidecar.is_file() else ""
                yield file, text

    def _from_metadata(self, metadata: Path) -> Iterator[tuple[Path, str]]:
        """List (image file, caption) from ``metadata.jsonl``; raises :class:`DataError` that names the broken line."""
        inside = self.folder.resolve()
        try:
            lines = metadata.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{metadata} is not UTF-8 text: {error}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name, caption = entry["file_name"], entry.get("text") or ""
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f'{metadata}, line {number}: expected an object like {{"file_name": "a.png", "text": "a cat"}} '
                    f"({error})"
                ) from error
            file = self.folder / str(name)
            if not file.resolve().is_relative_to(inside):
                raise DataError(f"{metadata}, line {number}: {name!r} lies outside the folder")
            yield file, str(caption)

    def _refuse_if_mostly_unusable(self) -> None:
        """Raise :class:`DataError` for a folder without images, or with too many that cannot be used."""
        found = len(self) + len(self.skipped)
        if not found:
            raise DataError(
                f"{self.folder} has no captioned images: expected {METADATA} with file_name and text, or images "
                f"({', '.join(IMAGE_SUFFIXES)}) with a .txt caption beside each"
            )
        if len(self.skipped) > MAX_SKIPPED * found or not len(self):
            raise DataError(f"only {len(self)} of {found} images can be used: {self.description}")


def read_image(file: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Read an image file as uint8 RGB: upright, opaque, scaled, and cropped to the centre square."""
    return np.asarray(ImageOps.fit(open_image(file), (size, size), Image.Resampling.LANCZOS))


def unreadable(file: Path) -> str:
    """Explain in words why an image file cannot be used; an empty string if it can."""
    if not file.is_file():
        return "no such file"
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                return f"{image.width}×{image.height} pixels, more than {MAX_IMAGE_PIXELS // 1_000_000} million"
        open_image(file)
    except (*UNREADABLE, DataError, UsageError):
        return "not a readable image"
    return ""
