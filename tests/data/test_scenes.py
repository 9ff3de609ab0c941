"""Scenes as pairs, and any pairs as a corpus."""

import pytest
import torch

from gobelin import scenes
from gobelin.data import Corpus, ScenePairs, find_world
from gobelin.errors import UsageError


def test_pairs_are_the_scenes():
    pairs = ScenePairs(world=scenes.NANO, count=5, seed=3)
    sample = scenes.sample(3, 4, scenes.NANO)
    assert (pairs[4].image == sample.image).all()
    assert pairs[4].caption == sample.caption
    assert sample.caption not in pairs[4].negatives


def test_an_unknown_world_is_told_the_choices():
    with pytest.raises(UsageError, match="unknown world 'mars': the choices are core, nano, rich"):
        find_world("mars")


@pytest.mark.parametrize("limit", [0, 2**30], ids=["read each time", "kept in memory"])
def test_a_corpus_gives_images_captions_and_negatives(monkeypatch, limit):
    monkeypatch.setattr("gobelin.data.corpus.IN_MEMORY_BYTES", limit)
    pairs = ScenePairs(world=scenes.NANO, count=40)
    read = []
    corpus = Corpus(pairs, advance=lambda: read.append(1))
    assert len(read) == len(corpus) == 40
    images = corpus.images(torch.tensor([7, 2]))
    expected = torch.from_numpy(pairs[2].image).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(images[1], expected)
    assert corpus.captions[7] == pairs[7].caption
    assert corpus.negatives[7] == pairs[7].negatives
    distinct, place = corpus.distinct_captions()
    assert len(set(distinct)) == len(distinct)
    assert [distinct[p] for p in place] == corpus.captions
