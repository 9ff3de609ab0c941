"""A dataset read once: captions, negatives and images, in memory or not."""

import pytest
import torch

from gobelin import scenes
from gobelin.data import CachedDataset, SceneDataset


@pytest.mark.parametrize("limit", [0, 2**30], ids=["read each time", "kept in memory"])
def test_it_gives_images_captions_and_negatives(monkeypatch, limit):
    monkeypatch.setattr("gobelin.data.cached_dataset.MAX_CACHED_BYTES", limit)
    source = SceneDataset(world=scenes.NANO, count=40)
    read = []
    dataset = CachedDataset(source, advance=lambda: read.append(1))
    assert len(read) == len(dataset) == 40
    images = dataset.images(torch.tensor([7, 2]))
    expected = torch.from_numpy(source[2].image).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(images[1], expected)
    assert dataset.captions[7] == source[7].caption
    assert dataset.negatives[7] == source[7].negatives
    unique, index = dataset.unique_captions()
    assert len(set(unique)) == len(unique)
    assert [unique[i] for i in index] == dataset.captions
