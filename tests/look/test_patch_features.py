"""Features of patches, against what was put into them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gobelin.errors import UsageError
from gobelin.look.patch_features import PatchFeatures, cluster_patches, correspond, join_layers, similarity_map


def features_of(values: torch.Tensor, layers: tuple[str, ...] = ("up",)) -> PatchFeatures:
    images = [Image.new("RGB", (4 * values.shape[3], 4 * values.shape[2])) for _ in values]
    return PatchFeatures(values=values, images=images, layers=layers)


def test_a_patch_is_found_where_it_went() -> None:
    before = torch.randn(1, 16, 6, 9)
    after = before.roll((2, 3), dims=(2, 3))
    one, other = features_of(before), features_of(after)
    for row in range(4):
        for column in range(6):
            x, y = correspond(one, (4 * column + 1, 4 * row + 2), other)
            assert (y // 4, x // 4) == (row + 2, column + 3)
    similar = similarity_map(one, (1, 2), other)
    assert similar.raw.shape == (24, 36)
    assert similar.raw.max() <= 1
    assert similar.overlay().size == (36, 24)


def test_features_between_patches_are_interpolated() -> None:
    values = torch.arange(6.0).expand(1, 3, 4, 6)  # the column's number
    features = features_of(values)
    assert features.at((9, 5)).tolist() == pytest.approx([(9 + 0.5) / 4 - 0.5] * 3)
    assert features.at((0, 0)).tolist() == pytest.approx([0] * 3)
    assert features.at((23, 15)).tolist() == pytest.approx([5] * 3)


def test_one_image_of_several_is_taken_by_its_number() -> None:
    values = torch.randn(3, 8, 4, 4)
    features = features_of(values)
    assert len(features) == 3
    assert torch.equal(features[-1].values, values[2:])
    with pytest.raises(IndexError):
        features[3]
    with pytest.raises(UsageError, match="features of 3 images: take those of one"):
        correspond(features, (0, 0), features[0])


def test_clusters_are_the_kinds_of_patches() -> None:
    kinds = torch.randint(0, 3, (2, 5, 7))
    centres = F.normalize(torch.randn(3, 12), dim=1)
    values = centres[kinds].permute(0, 3, 1, 2) * torch.rand(2, 1, 5, 7).add(0.5) + 0.01 * torch.randn(2, 12, 5, 7)
    labels = cluster_patches(features_of(values), 3)
    pairs = {(int(kind), int(label)) for kind, label in zip(kinds.flatten(), labels.flatten(), strict=True)}
    assert len(pairs) == 3
    assert torch.equal(labels, cluster_patches(features_of(values), 3))
    assert cluster_patches(features_of(values), 1).eq(0).all()


@pytest.mark.parametrize("count", [0, -1, 71, 2.5, "three", None])
def test_a_number_of_clusters_that_cannot_be_is_refused(count) -> None:
    with pytest.raises(UsageError, match=r"count is .*: give a whole number from 1 to 70"):
        cluster_patches(features_of(torch.randn(2, 3, 5, 7)), count)


@pytest.mark.parametrize("point", [(36, 0), (0, 24), (-1, 0), (1.5, 2), (1,), "ab", (True, None)], ids=str)
def test_a_point_that_is_not_in_the_image_is_refused(point) -> None:
    features = features_of(torch.randn(1, 4, 6, 9))
    with pytest.raises(UsageError, match=r"is not in the image of 36×24 pixels|the point is"):
        correspond(features, point, features)


def test_features_of_other_layers_are_not_compared() -> None:
    one, other = features_of(torch.randn(1, 4, 6, 9)), features_of(torch.randn(1, 4, 6, 9), ("mid", "down"))
    with pytest.raises(UsageError, match="features of up cannot be compared with mid and down"):
        correspond(one, (0, 0), other)


def test_layers_are_joined_on_the_finest_grid_with_equal_weight() -> None:
    fine, coarse = torch.randn(2, 5, 8, 6), 100 * torch.randn(2, 7, 4, 3)
    joined = join_layers([coarse, fine])
    assert joined.shape == (2, 12, 8, 6)
    assert torch.allclose(joined[:, 7:], F.normalize(fine, dim=1))
    assert joined[:, :7].norm(dim=1).max() <= 1 + 1e-5
    assert torch.equal(join_layers([coarse]), coarse)
    assert np.allclose(joined[:, 7:].norm(dim=1), 1, atol=1e-5)
