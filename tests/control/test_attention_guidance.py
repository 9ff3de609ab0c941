"""Attention guidance: what it wants of maps, and how latents are moved for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.control.conftest import COARSE, SITE, batch_of

from gobelin.control import AttentionGuidance, Region, attend_and_excite, box_guidance, regional_attention
from gobelin.control.batch import Batch, WordControl
from gobelin.errors import UsageError
from gobelin.pipeline import Pipeline
from gobelin.scenes import grade
from gobelin.tokenizer import Tokenizer


def resolved(control: WordControl, batch: Batch) -> AttentionGuidance:
    (guidance,) = control.resolve(batch)
    assert isinstance(guidance, AttentionGuidance)
    return guidance


def test_the_most_neglected_word_decides(tokenizer: Tokenizer) -> None:
    words = tokenizer.words("a red ring of blue")
    guidance = resolved(attend_and_excite("ring", "blue"), batch_of(words, words))
    probs = torch.full((2, 24, 20), 0.01)
    ring, blue = words.tokens("ring")[0], words.tokens("blue")[0]
    probs[:, 8, ring] = 0.5
    probs[1, 17, blue] = 0.5
    neglected, seen = guidance.loss({SITE: probs, COARSE: torch.zeros(2, 6, 20)})
    assert neglected.item() == pytest.approx(0.8)  # one of five words, and every patch looks at all alike
    assert seen < 0.5


def test_what_is_outside_of_its_region_is_to_go(tokenizer: Tokenizer) -> None:
    words = tokenizer.words("a red ring")
    guidance = resolved(box_guidance({"ring": Region.box(0, 0, 0.5, 1)}), batch_of(words, words, words))
    probs = torch.zeros(3, 24, 20)
    left, right, ring = 7, 10, [*words.tokens("ring")]
    probs[0, left, ring] = probs[1, right, ring] = probs[2, left, ring] = probs[2, right, ring] = 0.3
    assert guidance.loss({SITE: probs, COARSE: torch.rand(3, 6, 20)}).tolist() == pytest.approx([0, 1, 0.5])


@pytest.mark.parametrize("control", [regional_attention, box_guidance])
def test_a_word_is_painted_in_its_region(control: Callable[..., Any]) -> None:
    shipped = Pipeline.from_pretrained()
    for left, top in ((0.5, 0.0), (0.0, 0.5)):
        region = {"red circle": Region.box(left, top, left + 0.5, top + 0.5)}
        image = shipped("a red circle", seed=2, steps=12, sampler="dpmpp_2m", control=control(region)).images[0]
        (seen,) = grade(image)
        assert left * 64 <= seen.x <= left * 64 + 32
        assert top * 64 <= seen.y <= top * 64 + 32


def test_latents_are_moved_before_each_step(pipe: Pipeline) -> None:
    options = {"count": 2, "height": 32, "width": 48, "seed": 0}
    plain = pipe("a red circle", **options, trace=True)
    control = attend_and_excite("red", "circle", strength=0.05)
    moved = pipe("a red circle", **options, control=control, trace=True)
    finest = min(site.downscale for site in plain.heatmaps[0].maps)
    words = pipe.words("a red circle")
    batch = Batch(words=(words, words), latent_size=(8, 12), channels=4, sites=pipe.unet.attention_sites)

    def loss(result) -> float:
        maps = {
            site: torch.stack([heatmaps.maps[site][0, 0] for heatmaps in result.heatmaps])
            for site in result.heatmaps[0].maps
            if site.downscale == finest
        }
        return resolved(control, batch).loss(maps).mean().item()

    assert loss(moved) < loss(plain)
    one_moved = pipe("a red circle", **options, control=attend_and_excite("red", strength=0.05, rows=[1])).latents
    assert torch.allclose(one_moved[0], plain.latents[0], atol=1e-5)
    assert not torch.allclose(one_moved[1], plain.latents[1], atol=1e-3)
    still = pipe("a red circle", **options, control=attend_and_excite("red", strength=0.0))
    assert torch.equal(still.latents, plain.latents)


def test_a_loss_of_ones_own_moves_latents_down_its_gradient(pipe: Pipeline) -> None:
    def to_bos(maps) -> torch.Tensor:
        return torch.stack([1 - probs[..., 0].mean(dim=1) for probs in maps.values()]).mean(dim=0)

    plain, moved = (
        pipe("a red circle", seed=0, steps=4, control=control, trace=True)
        for control in ((), AttentionGuidance(loss=to_bos, strength=0.2, end=1.0))
    )
    assert moved.heatmaps[0].shares()["bos"] > plain.heatmaps[0].shares()["bos"]


@pytest.mark.parametrize(
    "made",
    [
        lambda: AttentionGuidance(loss="most"),
        lambda: AttentionGuidance(loss=sum, strength="1"),
        lambda: AttentionGuidance(loss=sum, strength=float("inf")),
        lambda: AttentionGuidance(loss=sum, strength=-0.1),
        lambda: AttentionGuidance(loss=sum, end=2),
        lambda: AttentionGuidance(loss=sum, rows=1),
        lambda: AttentionGuidance(loss=sum, rows=[0.5]),
        lambda: box_guidance({}),
        lambda: box_guidance("left"),
        lambda: box_guidance({"ring": 3}),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(made: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match=r"give|say") as raised:
        made()
    assert "\n" not in str(raised.value)
