"""Scene → pixels: anti-aliased solid shapes on a plain background."""

from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from gobelin.scenes.colours import BACKGROUNDS, COLOURS
from gobelin.scenes.scene import Scene
from gobelin.scenes.shapes import SHAPES


def render(
    scene: Scene, *, noise: float = 0.0, rng: np.random.Generator | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw a scene of n objects.

    Returns the image, uint8 [size, size, 3] in [0, 255], and the objects' masks, bool [n, size, size]: the
    pixels whose centre lies in the object. ``noise`` is the standard deviation of normal noise, where white
    is 1; ``rng`` draws it, and without one the noise is the same each time.
    """
    image = np.empty((scene.size, scene.size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    masks = np.zeros((len(scene.objects), scene.size, scene.size), np.bool_)
    for thing, mask in zip(scene.objects, masks, strict=True):
        rows, y = _span(thing.y, thing.radius, scene.size)
        columns, x = _span(thing.x, thing.radius, scene.size)
        distance = thing.radius * SHAPES[thing.shape](x[None, :], y[:, None])
        patch = image[rows, columns]
        patch += np.clip(0.5 - distance, 0, 1)[..., None] * (np.array(COLOURS[thing.colour], np.float32) - patch)
        mask[rows, columns] = distance < 0
    if noise:
        rng = rng or np.random.default_rng(0)
        image += (255 * noise) * rng.standard_normal(image.shape, np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), masks


def _span(centre: float, radius: float, size: int) -> tuple[slice, NDArray[np.float32]]:
    """The pixels of an axis that an object can touch, and their coordinates in units of its radius."""
    start, stop = max(floor(centre - radius) - 1, 0), min(ceil(centre + radius) + 1, size)
    return slice(start, stop), ((np.arange(start, stop) + 0.5 - centre) / radius).astype(np.float32)
