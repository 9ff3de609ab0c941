"""A dataset read once: captions, negatives and images, on disk or read each time."""

import numpy as np
import pytest
import torch
from PIL import Image

from gobelin import scenes
from gobelin.data import CachedDataset, ImageFolderDataset, SceneDataset
from gobelin.errors import DataError


@pytest.mark.parametrize("limit", [0, 2**30], ids=["read each time", "kept on disk"])
def test_it_gives_images_captions_and_negatives(monkeypatch, limit, tmp_path):
    monkeypatch.setattr("gobelin.data.cached_dataset.MAX_CACHED_BYTES", limit)
    source = SceneDataset(world=scenes.NANO, count=40)
    dataset = CachedDataset(source, tmp_path)
    assert len(dataset) == 40
    images = dataset.images([7, 2])
    expected = torch.from_numpy(source[2].image).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(images[1], expected)
    assert dataset.captions(7) == (source[7].caption,)
    assert dataset.negatives(7) == source[7].negatives
    assert any(tmp_path.iterdir()) == (limit > 0)


def test_scenes_are_drawn_once_for_all_runs_that_share_a_folder(tmp_path, monkeypatch):
    source = SceneDataset(world=scenes.NANO, count=20)
    first = CachedDataset(source, tmp_path).images([3])
    monkeypatch.setattr(SceneDataset, "__getitem__", lambda self, index: pytest.fail("drawn again"))
    assert torch.equal(CachedDataset(source, tmp_path).images([3]), first)
    monkeypatch.undo()
    other = CachedDataset(SceneDataset(world=scenes.NANO, count=20, seed=1), tmp_path)
    assert not torch.equal(other.images([3]), first)


def folder(path, sizes):
    path.mkdir()
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (10 * number, 0, 0)).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"number {number}")
    return path


def test_only_changed_images_of_a_folder_are_read_again(tmp_path, monkeypatch):
    data = folder(tmp_path / "data", [(20, 20)] * 5)
    CachedDataset(ImageFolderDataset(data, 16), tmp_path / "cache")
    Image.new("RGB", (20, 20), "white").save(data / "3.png")
    read = []
    original = ImageFolderDataset.__getitem__
    monkeypatch.setattr(
        ImageFolderDataset, "__getitem__", lambda self, index: read.append(index) or original(self, index)
    )
    dataset = CachedDataset(ImageFolderDataset(data, 16), tmp_path / "cache")
    assert read == [3]
    assert (dataset.images([3]) == 1).all()
    assert dataset.captions(3) == ("number 3",)


def test_buckets_keep_their_sizes(tmp_path):
    data = folder(tmp_path / "data", [(64, 64), (128, 64), (64, 128), (120, 60)])
    dataset = CachedDataset(ImageFolderDataset(data, 64, buckets=True), tmp_path / "cache")
    wide = [1, 3]
    assert dataset.bucket_index[1] == dataset.bucket_index[3]
    height, width = dataset.sizes[dataset.bucket_index[1]]
    assert width > height
    assert dataset.images(wide).shape == (2, 3, height, width)
    assert np.isclose(dataset.images([3])[0, 0].mean().item(), 30 / 127.5 - 1, atol=0.01)


def test_an_image_that_is_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("gobelin.data.cached_dataset.MAX_CACHED_BYTES", 0)
    data = folder(tmp_path / "data", [(20, 20)] * 3)
    dataset = CachedDataset(ImageFolderDataset(data, 16), tmp_path / "cache")
    (data / "1.png").unlink()
    with pytest.raises(DataError, match=r"image 1 could be read when training began, and now cannot: .*1\.png"):
        dataset.images([0, 1])
