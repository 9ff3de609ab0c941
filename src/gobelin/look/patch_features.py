"""Patch features: what a U-Net's layers say of each patch of an image, to find the same thing in another one.

Tang et al. 2023 (DIFT, arXiv 2306.03881): features of a noised image correspond where the things in it do, though
nothing was trained for that. Points are pixels, column and row, of the images as they were looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from gobelin.errors import UsageError
from gobelin.look.heatmaps import HeatMap
from gobelin.validation import validated

_Point = Annotated[tuple[int, int], "a column and a row, as in (20, 31)"]


@dataclass(frozen=True, kw_only=True)
class PatchFeatures:
    """Features of images' patches: ``values`` [B, C, rows, columns], float32, of the ``layers`` that they come from."""

    values: Float[Tensor, "images channels rows columns"] = field(repr=False)
    images: list[Image.Image]
    layers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> "PatchFeatures":
        """Take those of one image."""
        chosen = range(len(self))[index]
        return PatchFeatures(values=self.values[chosen : chosen + 1], images=[self.images[chosen]], layers=self.layers)

    def at(self, point: tuple[int, int]) -> Float[Tensor, " channels"]:
        """Interpolate the features of one image at a pixel (column, row), between the centres of the patches."""
        x, y = validated("the point", tuple(point), _Point)
        (image,) = self.images
        if not (0 <= x < image.width and 0 <= y < image.height):
            raise UsageError(f"the pixel {x}, {y} is not in the image of {image.width}×{image.height} pixels")
        place = [2 * (x + 0.5) / image.width - 1, 2 * (y + 0.5) / image.height - 1]
        grid = torch.tensor(place, dtype=self.values.dtype, device=self.values.device)[None, None, None]
        return F.grid_sample(self.values, grid, padding_mode="border", align_corners=False)[0, :, 0, 0]


def similarity_map(features: PatchFeatures, point: tuple[int, int], other: PatchFeatures) -> HeatMap:
    """Compare a pixel of one image with every pixel of another: ``raw`` [H, W] is the cosine of their features.

    Cosines are computed patch by patch, and enlarged. Both are features of one image each. Raises :class:`UsageError`
    for a point outside of the image, and for features of other layers.
    """
    for one in (features, other):
        if len(one) != 1:
            raise UsageError(f"these are features of {len(one)} images: take those of one, as in features[0]")
    if features.layers != other.layers:
        raise UsageError(
            f"features of {' and '.join(features.layers)} cannot be compared with {' and '.join(other.layers)}"
        )
    (image,) = other.images
    cosines = F.cosine_similarity(features.at(point)[None, :, None, None], other.values)
    large = F.interpolate(cosines[None], size=(image.height, image.width), mode="bicubic")[0, 0]
    return HeatMap(label=f"like the pixel {point[0]}, {point[1]}", raw=large.clamp(-1, 1).cpu(), image=image)


def correspond(features: PatchFeatures, point: tuple[int, int], other: PatchFeatures) -> tuple[int, int]:
    """Find the pixel (column, row) of another image that is most like a pixel of one, by :func:`similarity_map`."""
    similar = similarity_map(features, point, other).raw
    row, column = divmod(int(similar.argmax()), similar.shape[1])
    return column, row


def cluster_patches(features: PatchFeatures, count: int) -> Int[Tensor, "images rows columns"]:
    """Cluster the patches of all images together by their features: the number of its cluster, from 0, for each.

    k-means by directions (features of length 1). It starts from the patch most like the mean, and then from the one
    least like those before, so that nothing is drawn (farthest-first traversal, Gonzalez 1985).
    """
    from scipy.cluster.vq import kmeans2  # which painting does without

    images, channels, rows, columns = features.values.shape
    patches = images * rows * columns
    validated("count", count, Annotated[int, Interval(ge=1, le=patches)])
    unit = F.normalize(features.values, dim=1).permute(0, 2, 3, 1).reshape(patches, channels).double().cpu()
    starts = [int((unit @ unit.mean(dim=0)).argmax())]
    while len(starts) < count:
        starts.append(int((unit @ unit[starts].T).amax(dim=1).argmin()))
    _, labels = kmeans2(unit.numpy(), unit[starts].numpy(), minit="matrix")
    return torch.from_numpy(labels.astype(np.int64)).reshape(images, rows, columns)


def join_layers(layers: Sequence[Float[Tensor, "images _ _ _"]]) -> Float[Tensor, "images channels rows columns"]:
    """Join feature maps of several layers: enlarged to the finest, and of length 1 each, so that none outweighs."""
    if len(layers) == 1:
        return layers[0]
    finest = max((one.shape[2:] for one in layers), key=lambda size: size[0] * size[1])
    large = [F.interpolate(F.normalize(one, dim=1), size=finest, mode="bilinear") for one in layers]
    return torch.cat(large, dim=1)
