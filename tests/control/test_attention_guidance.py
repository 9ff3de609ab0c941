"""Wishes: what they want of maps, and how latents are moved for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.control.conftest import COARSE, SITE, SIZE

from gobelin.control.attention_control import Region, regional
from gobelin.control.attention_guidance import excited, placed
from gobelin.pipeline import Pipeline
from gobelin.scenes import grade
from gobelin.tokenizer import Tokenizer


def test_the_most_neglected_word_decides_what_is_wished_for(tokenizer: Tokenizer) -> None:
    words = tokenizer.words("a red ring of blue")
    wish = excited(words, "ring", "blue", latent_size=SIZE)
    probs = torch.full((2, 24, 20), 0.01)
    ring, blue = words.tokens("ring")[0], words.tokens("blue")[0]
    probs[:, 8, ring] = 0.5
    probs[1, 17, blue] = 0.5
    neglected, seen = wish.loss({SITE: probs, COARSE: torch.zeros(2, 6, 20)})
    assert neglected.item() == pytest.approx(0.8)  # one of five words, and every patch looks at all alike
    assert seen < 0.5


def test_what_is_outside_of_its_region_is_wished_away(tokenizer: Tokenizer) -> None:
    words = tokenizer.words("a red ring")
    wish = placed(words, [Region.box("ring", 0, 0, 0.5, 1)], SIZE)
    probs = torch.zeros(3, 24, 20)
    left, right, ring = 7, 10, [*words.tokens("ring")]
    probs[0, left, ring] = probs[1, right, ring] = probs[2, left, ring] = probs[2, right, ring] = 0.3
    assert wish.loss({SITE: probs, COARSE: torch.rand(3, 6, 20)}).tolist() == pytest.approx([0, 1, 0.5])


@pytest.mark.parametrize("way", [regional, placed])
def test_a_word_is_painted_in_its_region(way: Callable[..., Any]) -> None:
    shipped = Pipeline.from_pretrained()
    words, size = shipped.tokenizer.words("a red circle"), shipped.latent_size()
    for left, top in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
        region = [Region.box("red circle", left, top, left + 0.5, top + 0.5)]
        (seen,) = grade(shipped("a red circle", seed=2, edit=way(words, region, size)).images[0])
        assert left * 64 <= seen.x <= left * 64 + 32
        assert top * 64 <= seen.y <= top * 64 + 32


def test_a_wish_moves_the_latents_before_each_step(pipe: Pipeline) -> None:
    words = pipe.tokenizer.words("a red circle")
    plain = pipe("a red circle", count=2, height=32, width=48, trace=True)
    wish = excited(words, "red", "circle", latent_size=pipe.latent_size(32, 48), strength=0.05)
    moved = pipe("a red circle", count=2, height=32, width=48, edit=wish, trace=True)
    finest = min(site.downscale for site in plain.heatmaps[0].maps)

    def loss(result) -> float:
        maps = {
            site: torch.stack([heatmaps.maps[site][0, 0] for heatmaps in result.heatmaps])
            for site in result.heatmaps[0].maps
            if site.downscale == finest
        }
        return wish.loss(maps).mean().item()

    assert loss(moved) < loss(plain)
    second = excited(words, "red", latent_size=pipe.latent_size(32, 48), strength=0.05, rows=[1])
    one_moved = pipe("a red circle", count=2, height=32, width=48, edit=second).latents
    assert torch.allclose(one_moved[0], plain.latents[0], atol=1e-5)
    assert not torch.allclose(one_moved[1], plain.latents[1], atol=1e-3)
    still = excited(words, "red", latent_size=pipe.latent_size(32, 48), strength=0.0)
    assert torch.equal(pipe("a red circle", count=2, height=32, width=48, edit=still).latents, plain.latents)
