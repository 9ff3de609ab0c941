"""Images in and out: files, PIL images, arrays and tensors of anyone's, read one way, with one set of limits.

Inside Gobelin an image is a tensor in [-1, 1] (:data:`gobelin.types.Images`), at the door a PIL image of 8 bits.
"""

import base64
import io
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from gobelin.errors import DataError, UsageError
from gobelin.types import Images

ImageSource = str | PathLike[str] | Image.Image | NDArray[np.generic] | Tensor
"""A path, a PIL image, an array [height, width] or [height, width, 1, 3 or 4] of bytes, of 16 bits or of floats in
[0, 1], or a tensor [3, height, width] in [-1, 1]."""

MAX_IMAGE_PIXELS = 64_000_000  # a 60-megapixel camera's; decoded that is 256 MB
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for files that are no images, or broken ones."""
WHITE_FROM = 128
"""A pixel of a mask as light as this, of 0 to 255, is inpainted; diffusers' threshold."""
_DRAWN_FROM = 250  # strokes drawn in white, less what JPEG and anti-aliasing take from it


def open_image(source: ImageSource, name: str = "the image", at_least: int | None = None) -> Image.Image:
    """Open an image as 8-bit RGB: turned as its EXIF says, on white where it is transparent, 16 bits scaled to 8.

    ``at_least`` lets a JPEG be decoded at half, a quarter or an eighth of its size, where its sides stay twice as long
    as that: a fraction of the time for an image that is scaled down afterwards. Raises :class:`DataError` for a file
    that cannot be read, and :class:`UsageError` for what is no image; ``name`` is what the sentence calls it.
    """
    opened = _eight_bits(_opened(source, name, tensor_range=(-1, 1), at_least=at_least), name)
    if not _has_alpha(opened):
        return opened.convert("RGB")
    opaque = Image.new("RGBA", opened.size, "white")
    return Image.alpha_composite(opaque, opened.convert("RGBA")).convert("RGB")


def open_mask(source: ImageSource, name: str = "the mask") -> Image.Image:
    """Open a mask as 8-bit grey: white is inpainted, black stays.

    White strokes on a transparent layer are such a mask; any other transparency could mean either, and is refused.
    Tensors are [height, width] or [1, height, width] in [0, 1]. Raises as :func:`open_image`.
    """
    opened = _eight_bits(_opened(source, name, tensor_range=(0, 1)), name)
    if not _has_alpha(opened):
        return opened.convert("L")
    layer = opened.convert("RGBA")
    alpha = np.asarray(layer.getchannel("A"))
    grey = np.asarray(layer.convert("RGB").convert("L"))
    if alpha.min() < WHITE_FROM and (grey[alpha >= WHITE_FROM] < _DRAWN_FROM).any():
        raise UsageError(
            f"{name} is partly transparent, which could mean either: give white where to inpaint, on black"
        )
    return Image.composite(layer.convert("L"), Image.new("L", layer.size), layer.getchannel("A"))


def readable_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels that an image file claims; raises :class:`DataError` for one that is too large."""
    try:
        with Image.open(file) as image:
            _refuse_large(image.size, str(file))
            return image.size
    except UNREADABLE as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error


def images_to_tensor(images: Sequence[Image.Image] | NDArray[np.uint8]) -> Images:
    """Stack 8-bit RGB images of one size, or an array [batch, height, width, 3] of them, as a tensor in [-1, 1]."""
    levels = images if isinstance(images, np.ndarray) else np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(np.ascontiguousarray(levels)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def tensor_to_levels(images: Images) -> NDArray[np.uint8]:
    """Round images in [-1, 1], clamped to that range, to bytes [batch, height, width, 3]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def tensor_to_images(images: Images) -> list[Image.Image]:
    """Convert images in [-1, 1], clamped to that range, to PIL images."""
    return [Image.fromarray(np.ascontiguousarray(levels)) for levels in tensor_to_levels(images)]


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as PNG, with no metadata."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    """Encode an image as a ``data:`` URL, for HTML."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")


def _opened(
    source: ImageSource, name: str, tensor_range: tuple[float, float], at_least: int | None = None
) -> Image.Image:
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, Tensor):
        return _from_array(_from_tensor(source, name, tensor_range), name)
    elif isinstance(source, np.ndarray):
        return _from_array(source, name)
    elif isinstance(source, str | PathLike):
        file = Path(fspath(source))
        if not file.is_file():
            raise DataError(f"there is no image at {file}: give the path of one")
        readable_size(file)
        image = Image.open(file)
        if at_least is not None:
            image.draft("RGB", (2 * at_least, 2 * at_least))  # of JPEGs alone; twice, as scaling down averages
    else:
        raise UsageError(
            f"{name} is a {type(source).__name__}: give a path, a PIL image, an array of bytes or a tensor in [-1, 1]"
        )
    if 0 in image.size:
        raise UsageError(f"{name} is an image of {image.width}×{image.height} pixels: give one that has some")
    _refuse_large(image.size, name)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        if isinstance(source, str | PathLike):
            image.close()
        where = fspath(source) if isinstance(source, str | PathLike) else name
        raise DataError(f"{where} cannot be read as an image: {error}") from error


def _refuse_large(size: tuple[int, int], name: str) -> None:
    if size[0] * size[1] > MAX_IMAGE_PIXELS:
        raise DataError(
            f"{name} has {size[0]}×{size[1]} pixels: give {MAX_IMAGE_PIXELS // 1_000_000} million pixels at most"
        )


def _from_tensor(tensor: Tensor, name: str, value_range: tuple[float, float]) -> NDArray[np.generic]:
    """A tensor's values as floats in [0, 1], or its bytes, [height, width, channels] or [height, width]."""
    if tensor.ndim == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim == 3 and tensor.shape[0] in (1, 3) and tensor.numel():
        tensor = tensor.permute(1, 2, 0)
    elif tensor.ndim != 2 or not tensor.numel():
        raise UsageError(f"{name} is a tensor {list(tensor.shape)}: give [3, height, width], or a mask [height, width]")
    if not tensor.is_floating_point():
        return tensor.cpu().numpy()
    low, high = value_range
    levels = tensor.detach().float().cpu()
    if not (levels.isfinite().all() and low <= levels.min() and levels.max() <= high):
        raise UsageError(f"{name} is a tensor with values outside of [{low}, {high}]: scale it to that range")
    return ((levels - low) / (high - low)).numpy()


def _from_array(array: NDArray[np.generic], name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not array.size or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise UsageError(f"{name} is an array {list(array.shape)}: give [height, width] or [height, width, 3 or 4]")
    _refuse_large((array.shape[1], array.shape[0]), name)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = np.round(array.astype(np.float32) / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise UsageError(f"{name} is an array of floats outside of [0, 1]: scale them to that range, or give bytes")
        array = np.round(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UsageError(f"{name} is an array of {array.dtype}: give bytes (uint8), uint16, or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale what Pillow keeps in 16 bits, 32 bits or floats to 8; its own conversion turns all above 255 white."""
    if image.mode.startswith("I;16"):
        return _from_array(np.asarray(image).astype(np.uint16), name)
    if image.mode == "I":
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise UsageError(
                f"{name} has 32-bit levels from {levels.min()} to {levels.max()}: give an 8- or 16-bit image"
            )
        return _from_array(levels.astype(np.uint16), name)
    if image.mode == "F":
        return _from_array(np.asarray(image), name)
    return image.convert("LA") if image.mode == "La" else image  # Pillow converts premultiplied grey to nothing else


def _has_alpha(image: Image.Image) -> bool:
    return image.has_transparency_data
