"""Correspondence: points of objects are found again in another image by their features, in scenes with exact truth.

Two objects of other shapes and colours are drawn twice: moved, with their colours exchanged, or both. A point of an
object should be found in that object again, and at the same place in it. Raw pixels and the VAE's latents, compared in
the same way, are the marks, and chance.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from gobelin.captioned_images import FEATURE_TIMESTEP
from gobelin.errors import UsageError
from gobelin.evaluate.intervals import Mean, Share
from gobelin.evaluate.measurement_report import Report, ReportTable, as_json, mean_cell, share_cell
from gobelin.images import images_to_tensor
from gobelin.look.patch_features import PatchFeatures, cluster_patches, correspond
from gobelin.pipeline import Pipeline
from gobelin.scenes import Scene, World, render, sample

CORRESPONDENCE_SEED = 79  # of the scenes, apart from training's and those of other measurements
_TRIES = 64  # scenes that are tried for each pair
_POINTS = 4  # of each object, at most
_BATCH_SIZE = 16
_CHANGES = ("moved", "colours exchanged", "moved, colours exchanged")

Point = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ScenePair:
    """A scene's image, the image of what became of it, and for points of its objects where they are there.

    ``points`` are (column, row) in the first image, and in the second; ``objects`` are the objects' masks in the second
    one, [H, W], for each point, and ``masks`` those of the first image's objects.
    """

    change: str
    before: NDArray[np.uint8]
    after: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    points: list[tuple[Point, Point]]
    objects: list[NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class PointShares:
    """Shares of points that were found again: in the right object, and within a patch of their place in it."""

    object: Share
    place: Share


@dataclass(frozen=True, kw_only=True)
class Correspondence:
    """Correspondence by change and by what was compared, chance for each change, and how well clusters are objects.

    ``patch`` is a patch's side in pixels; ``clusters`` are the mean intersection over union of an object with the
    cluster that overlaps it most, of as many clusters as there are objects, and one for the background.
    """

    model: str
    world: str
    layers: tuple[str, ...]
    timestep: int
    patch: int
    found: dict[str, dict[str, PointShares]]
    chance: dict[str, dict[str, float]]
    clusters: dict[str, Mean]

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers."""
        return as_json(self)


def measure_correspondence(
    pipeline: Pipeline,
    world: World,
    count: int,
    advance: Callable[[], None] = lambda: None,
    split: str = "test",
    **options: Any,
) -> Correspondence:
    """Measure correspondence in ``count`` pairs of scenes of a split, for each change.

    ``options`` are those of :meth:`gobelin.pipeline.Pipeline.features`. ``advance`` is called after each pair. Raises
    :class:`UsageError` for a world without scenes of two objects that differ.
    """
    patch = pipeline.vae.config.factor
    outcomes: dict[tuple[str, str], list[list[tuple[bool, bool]]]] = {}
    chances: dict[str, list[tuple[float, float]]] = {change: [] for change in _CHANGES}
    overlaps: dict[str, list[list[float]]] = {}
    features = None
    for pairs in _batches(scene_pairs(world, count, split)):
        images = [Image.fromarray(image) for pair in pairs for image in (pair.before, pair.after)]
        features = pipeline.features(images, **options)
        compared = {"features": features, **baselines(pipeline, images)}
        for number, pair in enumerate(pairs):
            chances[pair.change].append(_chance(pair, patch))
            for name, one in compared.items():
                before, after = one[2 * number], one[2 * number + 1]
                hits = [
                    _outcome(correspond(before, point, after), place, mask, patch)
                    for (point, place), mask in zip(pair.points, pair.objects, strict=True)
                ]
                outcomes.setdefault((pair.change, name), []).append(hits)
                if pair.change == _CHANGES[0]:
                    overlaps.setdefault(name, []).append(_cluster_overlaps(before, pair.masks))
            advance()
    if features is None:
        raise UsageError(f"the world {world.name} has no scenes of two objects of other shapes and colours")
    found: dict[str, dict[str, PointShares]] = {change: {} for change in _CHANGES}
    for (change, name), groups in outcomes.items():
        numbers = [number for number, hits in enumerate(groups) for _ in hits]
        flat = [hit for hits in groups for hit in hits]
        found[change][name] = PointShares(
            object=Share.of([one for one, _ in flat], numbers), place=Share.of([one for _, one in flat], numbers)
        )
    return Correspondence(
        model=pipeline.name,
        world=world.name,
        layers=features.layers,
        timestep=int(options.get("timestep", FEATURE_TIMESTEP)),
        patch=patch,
        found=found,
        chance={
            change: dict(zip(("object", "place"), np.mean(values, axis=0).tolist(), strict=True))
            for change, values in chances.items()
        },
        clusters={name: Mean.of(groups) for name, groups in overlaps.items()},
    )


def scene_pairs(world: World, count: int, split: str) -> Iterator[ScenePair]:
    """Draw ``count`` scenes of two objects of other shapes and colours, each with its three changes."""
    index = found = 0
    while found < count and index < _TRIES * count:
        first, second = (sample(CORRESPONDENCE_SEED, number, world, split).scene for number in (index, index + 1))
        index += 2
        looks = [(thing.shape, thing.colour) for thing in first.objects]
        if len(looks) == len(second.objects) == 2 and all(len(set(look)) == 2 for look in zip(*looks, strict=True)):
            found += 1
            yield from _changed_pairs(first, second)


def _changed_pairs(scene: Scene, other: Scene) -> Iterator[ScenePair]:
    """Move a scene's objects to where another's are, exchange their colours, and do both."""
    one, two = scene.objects
    places = [
        replace(thing, x=there.x, y=there.y, radius=there.radius)
        for thing, there in zip(scene.objects, other.objects, strict=True)
    ]
    colours = two.colour, one.colour
    for change, things in (
        (_CHANGES[0], places),
        (_CHANGES[1], [replace(thing, colour=colour) for thing, colour in zip((one, two), colours, strict=True)]),
        (_CHANGES[2], [replace(thing, colour=colour) for thing, colour in zip(places, colours, strict=True)]),
    ):
        yield _pair(change, scene, replace(scene, objects=tuple(things), relation=None))


def _pair(change: str, scene: Scene, changed: Scene) -> ScenePair:
    before, masks = render(scene)
    after, masks_after = render(changed)
    points: list[tuple[Point, Point]] = []
    objects: list[NDArray[np.bool_]] = []
    for number, (thing, moved) in enumerate(zip(scene.objects, changed.objects, strict=True)):
        for x, y in _spread_points(masks[number]):
            scale = moved.radius / thing.radius
            place = moved.x + (x + 0.5 - thing.x) * scale, moved.y + (y + 0.5 - thing.y) * scale
            points.append(((x, y), (int(place[0]), int(place[1]))))
            objects.append(masks_after[number])
    return ScenePair(change=change, before=before, after=after, masks=masks, points=points, objects=objects)


def _spread_points(mask: NDArray[np.bool_]) -> list[Point]:
    """Choose points within a mask, not at its rim, evenly in the order of its pixels."""
    rows, columns = np.nonzero(ndimage.binary_erosion(mask))
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), _POINTS) + 2).round().astype(int)[1:-1]
    return [(int(columns[one]), int(rows[one])) for one in chosen]


@torch.no_grad()
def baselines(pipeline: Pipeline, images: Sequence[Image.Image]) -> dict[str, PatchFeatures]:
    """Make features of raw pixels, those of a latent's patch side by side, and of the VAE's latents."""
    vae = pipeline.vae
    pixels = images_to_tensor(images)
    latents = vae.images_to_latents(pixels.to(vae.device, vae.dtype)).float().cpu()
    found = {"VAE latents": latents, "raw pixels": F.pixel_unshuffle(pixels, vae.config.factor)}
    return {name: PatchFeatures(values=one, images=list(images), layers=(name,)) for name, one in found.items()}


def _outcome(found: Point, place: Point, mask: NDArray[np.bool_], patch: int) -> tuple[bool, bool]:
    """Tell whether a point is in the right object, and within a patch of its place."""
    near = (found[0] - place[0]) ** 2 + (found[1] - place[1]) ** 2 <= patch**2
    return bool(mask[found[1], found[0]]), near


def _chance(pair: ScenePair, patch: int) -> tuple[float, float]:
    """Compute the mean shares of pixels that would count as right."""
    rows, columns = np.indices(pair.after.shape[:2])
    near = [np.mean((columns - place[0]) ** 2 + (rows - place[1]) ** 2 <= patch**2) for _, place in pair.points]
    return float(np.mean([mask.mean() for mask in pair.objects])), float(np.mean(near))


def _cluster_overlaps(features: PatchFeatures, masks: NDArray[np.bool_]) -> list[float]:
    """Overlap each object with the cluster that overlaps it most."""
    count = len(masks) + 1
    labels = cluster_patches(features, count)[:, None].float()
    large = F.interpolate(labels, size=masks.shape[1:], mode="nearest")[0, 0].numpy()
    return [
        max(float((mask & (large == label)).sum() / (mask | (large == label)).sum()) for label in range(count))
        for mask in masks
    ]


def correspondence_report(content: dict[str, Any]) -> Report:
    """Lay out a :class:`Correspondence` from JSON."""
    rows = []
    for change, compared in content["found"].items():
        for name, shares in compared.items():
            rows.append((change, name, share_cell(shares["object"]), share_cell(shares["place"])))
        chance = content["chance"][change]
        rows.append((change, "chance", f"{chance['object']:.3f}", f"{chance['place']:.3f}"))
    clusters = [(name, mean_cell(mean)) for name, mean in content["clusters"].items()]
    return Report(
        title=f"Correspondence in {content['model']}",
        description=(
            f"World {content['world']}; features of {' and '.join(content['layers'])}, timestep {content['timestep']}."
        ),
        tables=[
            ReportTable(
                title="Points of two objects, found again",
                columns=("the objects are", "compared", "in the right object", f"within {content['patch']} pixels"),
                rows=rows,
            ),
            ReportTable(
                title="Clusters of one image's patches",
                columns=("clustered", "objects' intersection over union"),
                rows=clusters,
                note="k-means, one cluster more than objects; for each object the one that overlaps it most.",
            ),
        ],
    )


def _batches(pairs: Iterator[ScenePair]) -> Iterator[list[ScenePair]]:
    batch: list[ScenePair] = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == _BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch
