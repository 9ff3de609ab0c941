"""Named colours and backgrounds, and the perceived distance between two colours.

Colours are sRGB triples in [0, 255]. Distances are CIE76: the Euclidean distance in CIE L*a*b* (D65 white),
where about 2.3 is the smallest difference that an eye notices.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# GenEval's ten colours.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (221, 32, 38),
    "orange": (250, 133, 12),
    "yellow": (250, 220, 30),
    "green": (30, 150, 60),
    "blue": (24, 104, 216),
    "purple": (140, 36, 150),
    "pink": (255, 140, 196),
    "brown": (112, 66, 30),
    "black": (16, 16, 18),
    "white": (255, 255, 255),
}

# The second tone of each colour, for stripes and dots: 24 or more from the first, and from every background of
# the worlds that have textures. No mixture of the two looks like a background.
TONES: dict[str, tuple[int, int, int]] = {
    "red": (122, 18, 21),
    "orange": (150, 80, 7),
    "yellow": (138, 121, 16),
    "green": (16, 82, 33),
    "blue": (13, 57, 119),
    "purple": (77, 20, 82),
    "pink": (240, 74, 164),
    "brown": (45, 26, 12),
    "black": (30, 50, 95),
    "white": (160, 230, 255),
}

# Quiet backgrounds: 25 or more from every object colour of the worlds that use them. "paper" is too near
# white.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (174, 176, 180),
    "sage": (165, 184, 168),
    "sand": (190, 178, 156),
    "lilac": (182, 168, 204),
    "rose": (200, 168, 168),
    "slate": (130, 150, 172),
    "paper": (238, 236, 230),
}

# IEC 61966-2-1: linear sRGB to CIE XYZ, each row divided by the D65 white point.
_RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
) / np.array([[0.95047], [1.0], [1.08883]])
_LEVELS = np.arange(256) / 255
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4)


def rgb_to_lab(rgb: NDArray[np.uint8] | Sequence[tuple[int, int, int]]) -> NDArray[np.float64]:
    """Convert sRGB colours to CIE L*a*b* (D65 white).

    ``rgb`` is [..., 3] of whole numbers in [0, 255]; the result is [..., 3] with L* in [0, 100].
    """
    xyz = _LINEAR[np.asarray(rgb, dtype=np.uint8)] @ _RGB_TO_XYZ.T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=-1)


def colour_distance(a: NDArray[np.number], b: NDArray[np.number]) -> NDArray[np.floating]:
    """Compute the Euclidean distance of colours [..., 3], which broadcast: CIE76 ΔE where they are L*a*b*."""
    apart = a - b
    # Many times faster than np.linalg.norm over three numbers.
    return np.asarray(np.sqrt(np.einsum("...i,...i->...", apart, apart)))
