"""Image folder: anyone's captioned images, each opened once before training, so that nothing bad is found later."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from gobelin.data.captioned_files import (
    IMAGE_SUFFIXES,
    METADATA_NAMES,
    NOT_LISTED,
    CaptionedFile,
    SkippedImage,
    list_captioned_files,
)
from gobelin.data.dataset import CaptionedImage
from gobelin.errors import DataError, UsageError
from gobelin.images import MAX_IMAGE_PIXELS, UNREADABLE, open_image

MAX_SKIPPED = 0.5  # a folder with a larger share of unusable images is refused: it is likely the wrong folder


class ImageFolderDataset:
    """Read a folder of captioned images, with its subfolders, as Hugging Face's "imagefolder" datasets are laid out.

    :func:`~gobelin.data.captioned_files.list_captioned_files` says where captions come from; ``caption_column`` is
    that of the metadata. Every image is opened once, after which ``advance`` is called; unusable ones are listed in
    ``skipped``. Images are rotated by their EXIF orientation, composited on white, scaled so that the shorter side is
    ``size`` pixels, and cropped to the centre; of an animation the first frame counts. Raises :class:`DataError` for a
    missing folder, broken metadata, or if less than half of the images can be used.
    """

    def __init__(
        self,
        folder: str | Path,
        size: int = 64,
        caption_column: str | None = None,
        advance: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.folder = Path(folder)
        self.size = size
        if not self.folder.is_dir():
            raise DataError(f"no folder at {self.folder}: expected images with captions there")
        listed, self.skipped = list_captioned_files(self.folder, caption_column)
        self.files: list[CaptionedFile] = []
        for number, one in enumerate(listed, start=1):
            if reason := unreadable(one.file, size):
                name = one.file.relative_to(self.folder).as_posix()
                self.skipped.append(SkippedImage(name=name, reason=reason))
            else:
                self.files.append(one)
            advance(number, len(listed))
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

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of what is learned: names, captions and the files' bytes, wherever the folder is."""
        digest = hashlib.sha256()
        for one in self.files:
            name = one.file.relative_to(self.folder).as_posix()
            with one.file.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(repr((name, one.captions, content)).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> CaptionedImage:
        one = self.files[index]
        return CaptionedImage(image=read_image(one.file, self.size), captions=one.captions)

    def _refuse_if_mostly_unusable(self) -> None:
        """Raise :class:`DataError` for a folder without images, or with too many that cannot be used."""
        unusable = sum(not skip.reason.startswith(NOT_LISTED) for skip in self.skipped)
        found = len(self) + unusable
        if not found:
            raise DataError(
                f"{self.folder} has no captioned images: expected {' or '.join(METADATA_NAMES)} with file_name and "
                f"text, or images ({', '.join(IMAGE_SUFFIXES)}) with a .txt caption beside each"
            )
        if unusable > MAX_SKIPPED * found or not len(self):
            raise DataError(f"only {len(self)} of {found} images can be used: {self.description}")


def read_image(file: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Read an image file as uint8 RGB: upright, opaque, scaled, and cropped to the centre square."""
    return np.asarray(ImageOps.fit(open_image(file, at_least=size), (size, size), Image.Resampling.LANCZOS))


def unreadable(file: Path, size: int | None = None) -> str:
    """Explain in words why an image file cannot be used at a ``size``; an empty string if it can."""
    if not file.is_file():
        return f"a link to {file.readlink()}, which is not there" if file.is_symlink() else "no such file"
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                return f"{image.width}×{image.height} pixels, more than {MAX_IMAGE_PIXELS // 1_000_000} million"
        open_image(file, at_least=size)
    except (*UNREADABLE, DataError, UsageError) as error:
        return "truncated" if "truncated" in str(error) else "not a readable image"
    return ""
