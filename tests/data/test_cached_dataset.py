"""A dataset read once: captions, negatives and images, in memory or not."""

import numpy as np
import pytest
import torch

from gobelin import scenes
from gobelin.data import CachedDataset, CaptionedImage, SceneDataset


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
    assert dataset.captions[7] == (source[7].caption,)
    assert dataset.negatives[7] == source[7].negatives
    unique, index = dataset.unique_captions()
    assert len(set(unique)) == len(unique)
    picked = index.pick(torch.arange(len(source)), torch.Generator())
    assert [(unique[row],) for row in picked] == dataset.captions


class Several:
    """Images with one, two and three captions."""

    size, description, fingerprint = 8, "several", "1"
    texts = (("a",), ("b", "c"), ("d", "e", "a"))

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return CaptionedImage(image=np.zeros((8, 8, 3), np.uint8), captions=self.texts[index])


def test_every_caption_of_an_image_is_picked_as_often():
    unique, index = CachedDataset(Several()).unique_captions()
    assert unique == ["a", "b", "c", "d", "e"]
    images = torch.arange(3).repeat(3000)
    picked = [unique[row] for row in index.pick(images, torch.Generator().manual_seed(0))]
    for number, texts in enumerate(Several.texts):
        own = picked[number::3]
        assert set(own) == set(texts)
        assert all(abs(own.count(text) / 3000 - 1 / len(texts)) < 0.04 for text in texts)
