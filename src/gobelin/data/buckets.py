"""Aspect-ratio buckets, and the preprocessing of any image to one of a few sizes: upright, opaque, cropped or padded.

Buckets are NovelAI's (2022, "NovelAI Improvements on Stable Diffusion"), as sd-scripts has them: sides are multiples of
a step, no bucket has more pixels than the square, and each image goes to the one whose aspect is nearest to its own.
"""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.typing import ArrayLike
from PIL import Image, ImageColor, ImageOps

from gobelin.errors import DataError, UsageError
from gobelin.images import MAX_IMAGE_PIXELS, UNREADABLE, open_image
from gobelin.validation import Count, PositiveNumber, validate_fields

MAX_IMAGE_BYTES = 600_000_000  # of a file: 64 megapixels of four 16-bit channels, and no compression, take 512 MB
MAX_BUCKETS = 256  # their number is kept as a byte
_LONGEST_STEP, _SHORTEST_STEP = 64, 16  # pixels; 16 is 2 in latents, which a U-Net of two levels halves
_AT_ONCE = 1_000_000  # images, of whose sides numbers are made in memory
_ORIENTATION, _QUARTER_TURNS = 0x0112, 5  # EXIF: from 5 on, width and height change places
_SPARE = 1.25  # times the size that is asked for: "JPEGs are decoded small" in docs/decisions.md
_WHITE = (255, 255, 255)
_DECODING = 2  # counts the ways in which the same bytes became pixels, as caches are known by them


def bucket_sizes(size: int, step: int | None = None, max_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """List the buckets of ``size``: (height, width) in pixels, from the tallest to the widest, the square among them.

    Sides are multiples of ``step``, by default an eighth of ``size`` in multiples of 16, from 16 to 64 pixels. For each
    width, the height is the greatest that keeps the area at size² or less. No side is longer than ``max_aspect`` times
    the other. Raises :class:`UsageError` for a ``size`` that is no multiple of the step.
    """
    step = step or min(_LONGEST_STEP, max(_SHORTEST_STEP, 16 * round(size / 128)))
    if size % step:
        raise UsageError(f"buckets of {size} pixels have sides in multiples of {step}: give a size that is one")
    shorter = range(step, size, step)
    tall = [(size * size // side // step * step, side) for side in shorter]
    tall = [(height, width) for height, width in tall if height <= max_aspect * width]
    # Of two with one height, the wider has more pixels: (80, 48) and not (80, 32).
    tall = list({height: (height, width) for height, width in tall if height > size}.values())
    sizes = (*tall, (size, size), *((width, height) for height, width in reversed(tall)))
    if len(sizes) > MAX_BUCKETS:
        raise UsageError(f"{size} pixels in steps of {step} make {len(sizes)} buckets: give a longer step")
    return sizes


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Make any image one of ``sizes``: turned by its EXIF, laid on the ``background``, scaled, and fitted.

    ``fit="crop"`` scales an image to cover its bucket and cuts what stands over on both sides, ``"pad"`` scales it to
    lie within and adds background. ``buckets`` takes those of :func:`bucket_sizes`; without, every image is ``size`` by
    ``size``. Raises :class:`UsageError` for a colour that is none.
    """

    size: Count = 64
    buckets: bool = False
    step: Count | None = None
    max_aspect: PositiveNumber = 2.0
    fit: Literal["crop", "pad"] = "crop"
    background: str = "white"

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.max_aspect < 1:
            raise UsageError(f"max_aspect is {self.max_aspect}: give 1 or more, the longer side by the shorter")
        _ = self.sizes, self.colour

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each bucket, in pixels; one without buckets."""
        return bucket_sizes(self.size, self.step, self.max_aspect) if self.buckets else ((self.size, self.size),)

    @cached_property
    def colour(self) -> tuple[int, int, int]:
        """The background as red, green and blue, of 0 to 255."""
        try:
            levels = ImageColor.getrgb(self.background)
        except ValueError:
            levels = ()
        if len(levels) != 3:
            raise UsageError(f"background is {self.background!r}: give an opaque colour, as white, grey or #f0f0f0")
        return levels

    @property
    def key(self) -> str:
        """Say everything that changes pixels, for a fingerprint."""
        return repr((_DECODING, self.sizes, self.fit, self.colour))

    def assign(self, widths: ArrayLike, heights: ArrayLike) -> UInt8[np.ndarray, " images"]:
        """Number the bucket of each image: the one whose aspect is nearest as a ratio, which is cropped the least."""
        aspects = np.array([np.log(width / height) for height, width in self.sizes])
        between = (aspects[1:] + aspects[:-1]) / 2
        wide, high = np.asarray(widths), np.asarray(heights)
        numbers = np.zeros(len(wide), np.uint8)
        for start in range(0, len(wide) if len(between) else 0, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            numbers[part] = np.searchsorted(between, np.log(wide[part] / high[part]))
        return numbers

    def scales(
        self, widths: Int[np.ndarray, " images"], heights: Int[np.ndarray, " images"]
    ) -> Float[np.ndarray, " images"]:
        """Compute the factor by which each image is scaled; those above 1 are enlarged."""
        ratios = self._ratios(widths, heights)
        return ratios.max(axis=0) if self.fit == "crop" else ratios.min(axis=0)

    def losses(
        self, widths: Int[np.ndarray, " images"], heights: Int[np.ndarray, " images"]
    ) -> Float[np.ndarray, " images"]:
        """Compute the share of each image's area that the crop cuts off; zeros where images are padded."""
        ratios = self._ratios(widths, heights)
        return 1 - ratios.min(axis=0) / ratios.max(axis=0) if self.fit == "crop" else np.zeros(ratios.shape[1])

    def _ratios(
        self, widths: Int[np.ndarray, " images"], heights: Int[np.ndarray, " images"]
    ) -> Float[np.ndarray, "2 images"]:
        """Divide the bucket's height and width by the image's."""
        to = np.array(self.sizes)[self.assign(widths, heights)]
        return np.stack([to[:, 0] / heights, to[:, 1] / widths])

    def read(self, content: bytes, name: str) -> UInt8[np.ndarray, "height width 3"]:
        """Read a file's bytes as uint8 RGB of its bucket's size; raises as :func:`decode`."""
        to_height, to_width = self.sizes[0]
        if len(self.sizes) > 1:
            width, height = upright_size(content, name)
            to_height, to_width = self.sizes[int(self.assign([width], [height])[0])]
        image = decode(content, name, at_least=(to_width, to_height), background=self.colour)
        if self.fit == "crop":
            return np.asarray(ImageOps.fit(image, (to_width, to_height), Image.Resampling.LANCZOS))
        return np.asarray(ImageOps.pad(image, (to_width, to_height), Image.Resampling.LANCZOS, color=self.colour))


def upright_size(content: bytes, name: str) -> tuple[int, int]:
    """Width and height in pixels that an image file claims, turned as its EXIF says; raises :class:`DataError`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _upright(image)
    except UNREADABLE as error:
        raise DataError(f"{name} cannot be read as an image: {error}") from error


def decode(
    content: bytes, name: str, at_least: tuple[int, int] | None = None, background: tuple[int, int, int] = _WHITE
) -> Image.Image:
    """Decode a file's bytes as 8-bit RGB, as :func:`~gobelin.images.open_image` does, on any ``background``.

    ``at_least`` is a width and height, upright: a JPEG that is much larger is decoded at a half, a quarter or an eighth
    of its size. Raises :class:`DataError` for what cannot be read, and for more than 64 million pixels.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            width, height = _upright(opened)
            if width * height > MAX_IMAGE_PIXELS:
                most = MAX_IMAGE_PIXELS // 1_000_000
                raise DataError(f"{name} has {width}×{height} pixels: give {most} million pixels at most")
            if at_least is not None:
                across, down = at_least if (width, height) == opened.size else at_least[::-1]
                opened.draft("RGB", (int(_SPARE * across), int(_SPARE * down)))  # of JPEGs alone
            opened.load()
            return open_image(_laid_on(opened, background), name)
    except UNREADABLE as error:
        if isinstance(error, UsageError):  # a ValueError too, and a sentence of its own
            raise
        raise DataError(f"{name} cannot be read as an image: {error}") from error


def _upright(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(_ORIENTATION, 1) >= _QUARTER_TURNS
    return (image.height, image.width) if turned else image.size


def _laid_on(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Lay a transparent image on a colour; white, and what has more than 8 bits, is left to ``open_image``."""
    if background == _WHITE or not image.has_transparency_data or image.mode.startswith(("I", "F")):
        return image
    upright = ImageOps.exif_transpose(image)
    layer = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")
