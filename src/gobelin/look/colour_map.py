"""Colour map: perceptually uniform colours of values, and images with heat maps over them."""

from functools import cache

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

LEVELS = 256


@cache
def colour_map() -> np.ndarray:
    """Compute the colours from night blue over red to pale yellow, uint8 [256, 3], in even steps of lightness.

    A path through OKLab (Ottosson 2020, https://bottosson.github.io/posts/oklab): lightness rises evenly, the hue
    turns from blue to yellow, and the colours are fullest half-way.
    """
    t = np.linspace(0, 1, LEVELS)
    lightness = 0.16 + 0.80 * t
    chroma = 0.04 + 0.15 * np.sin(np.pi * t) ** 0.8
    hue = np.deg2rad(-85 + 190 * t)
    return _srgb(np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1))


def colour_values(values: Tensor) -> Image.Image:
    """Draw values [H, W] in [0, 1] in colour."""
    levels = (values.clamp(0, 1) * (LEVELS - 1)).round().long().cpu().numpy()
    return Image.fromarray(colour_map()[levels])


def overlay_values(image: Image.Image, values: Tensor, size: int | None = None) -> Image.Image:
    """Draw an image in dim grey, and over it values [H, W] in [0, 1], in colour where they are high.

    ``size`` is the longer side in pixels, by default the image's own.
    """
    width, height = image.size
    scale = 1 if size is None else size / max(width, height)
    width, height = round(width * scale), round(height * scale)
    large = F.interpolate(values[None, None].float(), size=(height, width), mode="bicubic")[0, 0].clamp(0, 1)
    grey = np.asarray(image.convert("L").resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    weight = (0.25 + 0.75 * large.cpu().numpy() ** 0.7)[..., None]
    mixed = (1 - weight) * (40 + 0.6 * grey[..., None]) + weight * np.asarray(colour_values(large), dtype=np.float32)
    return Image.fromarray(mixed.round().astype(np.uint8))


def _srgb(oklab: np.ndarray) -> np.ndarray:
    """Convert OKLab colours [N, 3] to sRGB bytes, clipped to what a screen can show."""
    to_lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = ((oklab @ to_lms.T) ** 3 @ to_rgb.T).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (encoded * 255).round().astype(np.uint8)
