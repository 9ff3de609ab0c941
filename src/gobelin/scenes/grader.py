"""The grader: read from pixels what an image shows, without seeing its prompt.

The background is the mode of the border; objects are what stands out against it, in connected components;
colours go to the nearest prototype and shapes to the template that overlaps most, if its outline is theirs;
textures to the pattern that correlates best. The tolerances were tuned on renders, blurred and noisy ones too, and
on round trips through a VAE, never on a model's samples.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from gobelin.errors import UsageError
from gobelin.scenes.colours import BACKGROUNDS, COLOURS, TONES, colour_distance, rgb_to_lab
from gobelin.scenes.shapes import SHAPES
from gobelin.scenes.textures import TEXTURE_PERIOD, TEXTURES
from gobelin.scenes.world import CORE, World

UNKNOWN = "unknown"

_FOREGROUND = 18.0  # ΔE of an object from the background
_LEAST_CONTRAST = 60.0  # sRGB distance; half of it is more than noise
_BORDER_SPREAD = 24.0  # sRGB distance within which border pixels are of one colour
_LEAST_AREA = 25  # pixels
_LEAST_CORE = 6  # pixels; thinner objects are read whole
_LEAST_IOU = 0.8
_MOST_STRAY = 0.5  # pixels; true renders stay below 0.4, blurred by 0.7 px or through a VAE as well
# Shapes are compared on a grid of 30 × 30 points about the centre of the box, in units of √(width · height).
_AT = (np.arange(30) - 14.5) / 24
# A template is refitted to the box: scaled and shifted, across and down.
_SCALES = (0.94, 1.0, 1.06)
_SHIFTS = (-0.03, 0.0, 0.03)
_MOST_PIXELS = 200  # whose colour is compared, at most
# The share of the second tone over an object has a standard deviation: below the first it is solid, above the second
# it follows a pattern or is unknown.
_SOLID_SPREAD, _PATTERN_SPREAD = 0.08, 0.25
_LEAST_CORRELATION = 0.5
_RIM = 0.0225  # of a radius: an outline's length is the area this near to it, over twice this
_EIGHT_WAYS = np.ones((3, 3), np.bool_)


@dataclass(frozen=True, kw_only=True, eq=False)
class Detection:
    """An object that the grader found.

    ``shape`` is "unknown" where no template overlaps by ``iou`` ≥ 0.8 with an outline that strays from the
    object's by 0.5 pixels at most: ``stray`` is the area between the two, over the length. ``mask`` is bool
    [H, W], ``area`` its pixels and ``box`` its left, top, right and bottom edges in pixels, right and bottom
    exclusive. ``texture`` is "unknown" where the tones of the object follow no pattern, ``size`` None in a world
    without such words, and ``background`` the name of the background.
    """

    shape: str
    colour: str
    area: int
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]
    iou: float
    stray: float
    texture: str = "solid"
    size: str | None = None
    background: str | None = None

    @property
    def x(self) -> float:
        """The centre of the box, in pixels from the left edge of the image."""
        return (self.box[0] + self.box[2]) / 2

    @property
    def y(self) -> float:
        """The centre of the box, in pixels from the top edge of the image."""
        return (self.box[1] + self.box[3]) / 2

    @property
    def width(self) -> float:
        """The width of the box in pixels."""
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        """The height of the box in pixels."""
        return self.box[3] - self.box[1]


def grade(image: np.ndarray | Image.Image, world: World = CORE) -> list[Detection]:
    """Find the objects of an image, from top to bottom.

    ``image`` is uint8 [H, W, 3] in [0, 255], or a PIL image. Only the shapes, colours, textures, sizes and
    backgrounds of ``world`` are known. Raises UsageError for an array of another kind.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise UsageError(f"Expected a uint8 image [H, W, 3]; got {pixels.dtype} {list(pixels.shape)}.")
    background = _border_colour(pixels)
    grounds = rgb_to_lab([BACKGROUNDS[name] for name in world.backgrounds])
    ground = world.backgrounds[int(colour_distance(grounds, rgb_to_lab(background)).argmin())]
    cover = _coverage(pixels, background)
    labels = np.empty(cover.shape, np.int32)
    ndimage.label(cover > 0.5, _EIGHT_WAYS, output=labels)
    detections = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        part = labels[rows, columns] == number
        area = int(part.sum())
        if area < _LEAST_AREA:
            continue
        core = _core(part)
        looks = rgb_to_lab(pixels[rows, columns][core])
        if np.median(colour_distance(looks, rgb_to_lab(background))) < _FOREGROUND:
            continue
        colour = _nearest_colour(looks, world)
        texture = _read_texture(pixels[rows, columns], core, colour, background, world)
        mask = np.zeros(labels.shape, np.bool_)
        mask[rows, columns] = part
        others = (labels > 0) & ~mask
        box = (columns.start, rows.start, columns.stop, rows.stop)
        shape, iou, stray = _match_shape(np.where(others, 0, cover), box, area, world.shapes)
        detections.append(
            Detection(
                shape=shape,
                colour=colour,
                texture=texture,
                size=world.size_of(_radius(shape, area, box)),
                background=ground,
                area=area,
                box=box,
                mask=mask,
                iou=iou,
                stray=stray,
            )
        )
    return detections


def _border_colour(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Find the background: the colour [3] that most of the border is near."""
    border = np.concatenate((pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]))[::2]
    near = colour_distance(border[:, None].astype(np.float32), border) < _BORDER_SPREAD
    return np.median(border[near[near.sum(axis=1).argmax()]], axis=0).astype(np.uint8)


def _coverage(pixels: NDArray[np.uint8], background: NDArray[np.uint8]) -> NDArray[np.floating]:
    """Compute how much of each pixel an object covers, [H, W] in [0, 1].

    Pixels at an edge mix object and background in proportion, so this is their distance from the background as
    a share of the most that their neighbourhood reaches. One half is the outline, whether sharp or blurred.
    """
    distance = colour_distance(pixels.astype(np.float32), background)
    return distance / np.maximum(_LEAST_CONTRAST, ndimage.maximum_filter(distance, 5))


def _core(part: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Erode an object's mask, so that edge pixels, which mix colours, are left out."""
    core = np.asarray(ndimage.binary_erosion(part), np.bool_)
    return core if core.sum() >= _LEAST_CORE else part


def _nearest_colour(looks: NDArray[np.float64], world: World) -> str:
    """Name the colour whose tones are nearest to the pixels [n, 3], in L*a*b*."""
    tones = _lab_tones(world)  # [tones, colours, 3]
    if len(tones) == 1:
        return world.colours[int(colour_distance(tones[0], np.median(looks, axis=0)).argmin())]
    some = looks[:: 1 + len(looks) // _MOST_PIXELS]
    apart = colour_distance(some[:, None, None], tones).min(axis=1)
    return world.colours[int(apart.mean(axis=0).argmin())]


@cache
def _lab_tones(world: World) -> NDArray[np.float64]:
    """List the tones of each colour in L*a*b*: one, or with textures both and the one half way between."""
    first, second = ([of[name] for name in world.colours] for of in (COLOURS, TONES))
    if world.textures == ("solid",):
        return rgb_to_lab(first)[None]
    return rgb_to_lab(np.stack((first, np.add(first, second) // 2, second)).astype(np.uint8))


def _read_texture(
    pixels: NDArray[np.uint8], core: NDArray[np.bool_], colour: str, background: NDArray[np.uint8], world: World
) -> str:
    """Name the texture of an object of a known colour, by the pattern of its second tone."""
    if world.textures == ("solid",):
        return "solid"
    first, second = np.array(COLOURS[colour], np.float64), np.array(TONES[colour], np.float64)
    # A pixel is a mixture of the first tone, the second and, near a blurred edge, the background.
    mixture = np.linalg.pinv(np.stack((second - first, background - first)))
    share = np.clip((pixels[core] - first) @ mixture[:, 0], 0, 1)
    if share.std() < _SOLID_SPREAD:
        return "solid" if share.mean() < 0.5 else UNKNOWN
    # The patterns repeat, so pixels at the same place in the period count together.
    rows, columns = np.nonzero(core)
    places = (rows % TEXTURE_PERIOD) * TEXTURE_PERIOD + columns % TEXTURE_PERIOD
    weights = np.bincount(places, minlength=TEXTURE_PERIOD**2) / len(places)
    shares = np.bincount(places, share, minlength=TEXTURE_PERIOD**2) / len(places)
    names, patterns = _patterns(world.textures)
    means = patterns @ weights
    spreads = np.sqrt(np.maximum(patterns**2 @ weights - means**2, 1e-6))
    correlation = (patterns @ shares - means * share.mean()) / (spreads * share.std())
    best = int(correlation.argmax())
    if correlation[best] >= _LEAST_CORRELATION:
        return names[best]
    return "solid" if share.std() < _PATTERN_SPREAD else UNKNOWN


@cache
def _patterns(textures: tuple[str, ...]) -> tuple[list[str], NDArray[np.float64]]:
    """Shift the textures that are not solid by each whole number of pixels: names, and [n, TEXTURE_PERIOD²]."""
    at = np.arange(TEXTURE_PERIOD, dtype=np.float64)
    shifts = [
        (name, TEXTURES[name](at[None, :] - right, at[:, None] - down).ravel())
        for name in textures
        if name != "solid"
        for right, down in product(at, at)
    ]
    return [name for name, _ in shifts], np.stack([pattern for _, pattern in shifts]).astype(np.float64)


def _radius(shape: str, area: int, box: tuple[int, int, int, int]) -> float:
    """Compute the radius of the disc that a shape of this area fits into, in pixels; half the box of an unknown one."""
    if shape == UNKNOWN:
        return max(box[2] - box[0], box[3] - box[1]) / 2
    return math.sqrt(area / _unit_area(shape))


@cache
def _unit_area(shape: str) -> float:
    """Compute the area of a shape of radius 1."""
    fine = np.linspace(-1, 1, 401)
    return float((SHAPES[shape](fine[None, :], fine[:, None]) <= 0).mean() * 4)


def _match_shape(
    cover: NDArray[np.floating], box: tuple[int, int, int, int], area: int, shapes: tuple[str, ...]
) -> tuple[str, float, float]:
    """Match the object of that ``area`` in a box of ``cover`` with templates: its shape, the best IoU, its stray."""
    left, top, right, bottom = box
    reach = _AT * math.sqrt((right - left) * (bottom - top))
    grid = np.meshgrid((top + bottom - 1) / 2 + reach, (left + right - 1) / 2 + reach, indexing="ij")
    mask = (ndimage.map_coordinates(cover, grid, order=1) > 0.5).ravel().astype(np.float32)
    templates = _templates(shapes)
    common = templates.masks @ mask
    iou = (common / (templates.areas + mask.sum() - common)).max(axis=-1)
    best = int(iou.argmax())
    stray = (1 - float(iou[best])) * math.sqrt(area) / templates.outlines[best]
    known = iou[best] >= _LEAST_IOU and stray <= _MOST_STRAY
    return shapes[best] if known else UNKNOWN, float(iou[best]), stray


class _Templates(NamedTuple):
    """Template masks of 0 and 1, [shapes, refits, points], about the centres of the shapes' boxes.

    ``areas`` are in points; ``outlines`` are the lengths of the shapes' outlines, where their area is 1.
    """

    masks: NDArray[np.float32]
    areas: NDArray[np.float32]
    outlines: list[float]


@cache
def _templates(shapes: tuple[str, ...]) -> _Templates:
    """Draw the templates of the shapes, each refitted in several ways."""
    fine = np.linspace(-1, 1, 401)
    step = fine[1] - fine[0]
    refits = np.stack([(_AT - shift) / scale for scale in _SCALES for shift in _SHIFTS])
    masks, outlines = [], []
    for name in shapes:
        distance = SHAPES[name](fine[None, :], fine[:, None])
        inside = distance <= 0
        within = np.abs(distance) < _RIM
        outlines.append(float(within.sum() * step / (2 * _RIM) / math.sqrt(inside.sum())))
        xs, ys = fine[inside.any(axis=0)], fine[inside.any(axis=1)]
        reach = refits * math.sqrt((xs[-1] - xs[0]) * (ys[-1] - ys[0]))
        x, y = (xs[0] + xs[-1]) / 2 + reach, (ys[0] + ys[-1]) / 2 + reach
        masks.append(SHAPES[name](x[None, :, None, :], y[:, None, :, None]).reshape(len(refits) ** 2, -1) < 0)
    stacked = np.stack(masks).astype(np.float32)
    return _Templates(stacked, stacked.sum(axis=-1), outlines)
