"""Scenes: the objects of an image and their places, as JSON too; enough to draw the image again."""

from dataclasses import asdict, dataclass
from typing import Any

from gobelin.errors import DataError


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object of a scene. ``x`` (right) and ``y`` (down) are its centre and ``radius`` its disc's, all in pixels.

    The top left corner of the image is (0, 0) and the centre of the first pixel (0.5, 0.5). ``size`` is the word
    for it, "small" or "large", or None in a world that has no such words.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    texture: str = "solid"
    size: str | None = None

    @property
    def width(self) -> float:
        """The diameter of the disc that holds the object, in pixels."""
        return 2 * self.radius

    @property
    def height(self) -> float:
        """The same as ``width``."""
        return 2 * self.radius


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects on a background, in an image of ``size`` × ``size`` pixels.

    ``relation``, where the scene is about one, says where ``objects[0]`` is, seen from ``objects[1]``.
    ``gradient`` is the amount by which the background is brighter at the right and at the lower edge than in the
    middle, in levels of [0, 255].
    """

    objects: tuple[SceneObject, ...]
    background: str
    relation: str | None = None
    size: int = 64
    gradient: tuple[float, float] = (0.0, 0.0)

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers; ``from_json`` gives back an equal scene."""
        return asdict(self) | {"objects": [asdict(thing) for thing in self.objects]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Scene":
        """Read the scene that ``to_json`` wrote. Raises DataError for anything else."""
        try:
            objects = tuple(SceneObject(**thing) for thing in data["objects"])
            right, down = data.get("gradient", (0.0, 0.0))
            return cls(**{**data, "objects": objects, "gradient": (right, down)})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"Expected a scene as Scene.to_json writes it, but {error}.") from error
