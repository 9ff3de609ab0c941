"""Rendering: draw a scene's anti-aliased shapes, solid or with a texture, on a plain background or a gradient."""

from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from gobelin.scenes.colours import BACKGROUNDS, COLOURS, TONES
from gobelin.scenes.scene import Scene, SceneObject
from gobelin.scenes.shapes import SHAPES, Outline
from gobelin.scenes.textures import TEXTURES


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
    if any(scene.gradient):
        across = np.linspace(-1, 1, scene.size, dtype=np.float32)
        image += (scene.gradient[0] * across[None, :] + scene.gradient[1] * across[:, None])[..., None]
    masks = np.zeros((len(scene.objects), scene.size, scene.size), np.bool_)
    for thing, mask in zip(scene.objects, masks, strict=True):
        draw_shape(
            image, mask, SHAPES[thing.shape], _paint(thing, scene.size), x=thing.x, y=thing.y, radius=thing.radius
        )
    if noise:
        rng = rng or np.random.default_rng(0)
        image += (255 * noise) * rng.standard_normal(image.shape, np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), masks


def draw_shape(
    image: NDArray[np.float32],
    mask: NDArray[np.bool_],
    outline: Outline,
    paint: NDArray[np.float32],
    *,
    x: float,
    y: float,
    radius: float,
) -> None:
    """Draw one shape into ``image`` [size, size, 3] and into ``mask`` [size, size].

    ``paint`` is the colour, [3], or that of each pixel of the image; levels are in [0, 255]. ``x``, ``y`` and
    ``radius`` are in pixels, and the shape is anti-aliased.
    """
    rows, down = _span(y, radius, len(image))
    columns, right = _span(x, radius, len(image))
    distance = radius * outline(right[None, :], down[:, None])
    patch = image[rows, columns]
    paint = np.broadcast_to(paint, image.shape)[rows, columns]
    patch += np.clip(0.5 - distance, 0, 1)[..., None] * (paint - patch)
    mask[rows, columns] = distance < 0


def _paint(thing: SceneObject, size: int) -> NDArray[np.float32]:
    """Compute an object's colour: [3], or [size, size, 3] where it has a texture."""
    colour, tone = np.array(COLOURS[thing.colour], np.float32), np.array(TONES[thing.colour], np.float32)
    if thing.texture == "solid":
        return colour
    at = np.arange(size) + 0.5
    share = TEXTURES[thing.texture](at[None, :] - thing.x, at[:, None] - thing.y)[..., None]
    return (colour + share * (tone - colour)).astype(np.float32)


def _span(centre: float, radius: float, size: int) -> tuple[slice, NDArray[np.float32]]:
    """Find the pixels of an axis that an object can touch, and their coordinates in units of its radius."""
    start, stop = max(floor(centre - radius) - 1, 0), min(ceil(centre + radius) + 1, size)
    return slice(start, stop), ((np.arange(start, stop) + 0.5 - centre) / radius).astype(np.float32)
