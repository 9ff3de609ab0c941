"""Head weights against loops that say the same, against known truth, and in every way that maps are made."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from gobelin.attention import Trace
from gobelin.errors import ModelError, UsageError
from gobelin.evaluate.fit_heads import _logistic_regression, fit_heads
from gobelin.head_weights import PATCH_FEATURES, WORD_FEATURES, HeadWeights, head_features
from gobelin.look.page import word_map_data
from gobelin.look.sharp_maps import sharp_trace
from gobelin.pipeline import Pipeline
from gobelin.scenes import CORE

PROMPT = "a red circle and a blue star"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    """The shipped model without its head weights."""
    found = Pipeline.from_pretrained()
    found.model = replace(found.model, head_weights=None)
    return found.use("eager")


def random_attention(words: int, heads: int, own_heads: int, patches: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(patches)
    shares = torch.rand(words + 1, heads, patches, generator=generator).softmax(dim=0)
    own = torch.randn(own_heads, patches, patches, generator=generator).mul(3).softmax(dim=-1)
    return shares[:-1], shares[-1:], own


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 4, 15), (2, 5, 1, 6)])
def test_features_are_what_a_loop_finds(sizes):
    share, bos, own = random_attention(*sizes)
    words, heads, own_heads, patches = sizes
    found = head_features(share, bos, own)
    assert found.shape == (words, len(WORD_FEATURES) * heads + len(PATCH_FEATURES) * own_heads, patches)
    for word in range(words):
        mean, start = share[word].mean(dim=0), bos[0].mean(dim=0)
        expected = [*share[word], *(each / each.max() for each in share[word]), *bos[0]]
        gathers = [own[h] @ mean for h in range(own_heads)]
        gives = [own[h].T @ mean for h in range(own_heads)]
        expected += [each / each.max() for each in gathers]
        expected += [own[h] @ start for h in range(own_heads)]
        expected += [each / each.max() for each in gives]
        expected += [own[h].T @ start / own[h].sum(dim=0) for h in range(own_heads)]
        expected += [own[h].sum(dim=0) for h in range(own_heads)]
        assert torch.allclose(found[word], (torch.stack(expected) + 0.01).log(), atol=1e-5)


def test_attention_that_is_nothing_gives_finite_numbers():
    nothing = head_features(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.zeros(3, 4, 4))
    assert nothing.isfinite().all()


def test_weights_that_made_the_truth_are_found_again():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20_000, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.3, 1.0])
    true = torch.tensor([1.5, -0.2, 2.0, 0.0])
    covered = (features @ true - 1).sigmoid()
    found, bias = _logistic_regression(features, covered, torch.rand(20_000, generator=generator))
    assert torch.allclose(found, true, atol=0.05)
    assert bias == pytest.approx(-1, abs=0.05)


def weights_of(cross=2, own=1) -> HeadWeights:
    count = len(WORD_FEATURES) * (cross + 3) + len(PATCH_FEATURES) * own
    return HeadWeights(
        cross={"a.attn2": cross, "b.attn2": 3}, own={"a.attn1": own}, weights=torch.arange(count) / 8, bias=-0.5
    )


def test_json_gives_the_same_weights_back():
    weights = weights_of()
    back = HeadWeights.from_json(json.loads(json.dumps(weights.to_json())), "a file")
    assert (back.cross, back.own, back.bias) == (weights.cross, weights.own, weights.bias)
    assert torch.equal(back.weights, weights.weights)
    assert back.fits({"a.attn2": 2, "b.attn2": 3, "a.attn1": 1, "more": 4})
    assert not back.fits({"a.attn2": 2, "b.attn2": 4, "a.attn1": 1})
    assert not back.fits({"a.attn2": 2, "a.attn1": 1})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: [],
        lambda content: {},
        lambda content: content | {"sites": []},
        lambda content: content | {"sites": {}},
        lambda content: content | {"sites": {"a.attn2": content["sites"]["a.attn2"]}},
        lambda content: content | {"sites": content["sites"] | {"a.attn2": 3}},
        lambda content: content | {"sites": content["sites"] | {"a.attn2": {"share": [1.0]}}},
        lambda content: content | {"sites": content["sites"] | {"a.attn2": dict.fromkeys(WORD_FEATURES, ())}},
        lambda content: content | {"sites": content["sites"] | {"a.attn2": dict.fromkeys(WORD_FEATURES, ("much",))}},
        lambda content: content | {"sites": content["sites"] | {"a.attn2": dict.fromkeys(WORD_FEATURES, (1e999,))}},
        lambda content: content | {"sites": content["sites"] | {"a.attn2": dict.fromkeys(WORD_FEATURES, 5)}},
        lambda content: (
            content
            | {"sites": content["sites"] | {"a.attn2": {"share": [1.0], "share_of_maximum": [1.0, 2.0], "bos": [1.0]}}}
        ),
        lambda content: content | {"bias": None},
        lambda content: content | {"bias": 10**400},
        lambda content: content | {"bias": float("nan")},
    ],
)
def test_what_holds_no_head_weights_is_refused_with_the_files_name(spoil, tmp_path):
    with pytest.raises(ModelError, match=r"weights\.json holds no head weights: expected those"):
        HeadWeights.from_json(spoil(weights_of().to_json()), tmp_path / "weights.json")


def test_they_change_maps_and_no_bit_of_the_image(pipe, plain):
    ours, theirs = pipe(PROMPT, seed=3, trace="sharp"), plain(PROMPT, seed=3, trace="sharp")
    assert torch.equal(ours.latents, theirs.latents)
    maps, others = ours.heatmaps[0], theirs.heatmaps[0]
    assert maps.head_weights is not None
    assert others.head_weights is None
    assert not torch.equal(maps["circle"].raw, others["circle"].raw)
    assert torch.allclose(maps.unweighted()["circle"].raw, others["circle"].raw, atol=1e-6)
    assert others.unweighted() is others
    star = maps["star"].raw
    assert star.min() >= 0
    assert star.max() <= 1


def test_a_probability_is_high_on_the_object_and_low_beside_it(pipe):
    image = pipe(PROMPT, seed=3, trace="sharp")
    maps = image.heatmaps[0]
    pixels = torch.from_numpy(np.asarray(maps.image, dtype=np.float32))
    red = (pixels[..., 0] > 150) & (pixels[..., 1:].amax(dim=-1) < 110)
    assert red.sum() > 50
    assert maps["circle"].raw[red].mean() > 0.7
    assert maps["star"].raw[red].mean() < 0.2
    (first, share), *_ = maps.words_in((0, 0, 64, 64))
    assert share <= 1
    assert first.word in PROMPT.split()


@pytest.mark.parametrize("trace", ["sharp", Trace(sharp=True, per_head=True), Trace(sharp=True, per_step=True)])
def test_every_trace_and_looking_are_made_by_them(pipe, trace):
    maps = pipe(PROMPT, seed=3, steps=4, trace=trace).heatmaps[0]
    looked = pipe.look(maps.image, PROMPT, trace=trace)[0]
    for one in (maps, looked):
        assert one.head_weights is pipe.model.head_weights
        assert one["circle"].raw.max() > 0.5


def test_steps_are_selected_with_them_and_heads_sites_and_parts_without(pipe):
    maps = pipe(PROMPT, seed=3, steps=6, trace=Trace(sharp=True, per_step=True)).heatmaps[0]
    assert maps.steps > 1
    assert maps.select(steps=[0]).head_weights is maps.head_weights
    assert not torch.equal(maps.select(steps=[0])["star"].raw, maps.select(steps=[1])["star"].raw)
    for part in (maps.select(heads=[1]), maps.select(sites="up*"), maps.without("bos")):
        assert part.head_weights is None
        assert part.sharp
        assert part["star"].raw.isfinite().all()
    with pytest.raises(UsageError, match="trace its attn1 too"):
        maps.select(sites="*attn2")


def test_words_beside_and_negative_ones_have_probabilities_too(pipe):
    trace = Trace(sharp=True, also=("circle", "square"), negative=True)
    maps = pipe("a red circle", negative_prompt="a blue star", seed=3, guidance=3.0, trace=trace).heatmaps[0]
    beside = maps.also["circle"].raw
    there = maps["circle"].raw
    assert torch.corrcoef(torch.stack([beside.flatten(), there.flatten()]))[0, 1] > 0.8
    assert maps.negative["star"].raw.shape == there.shape
    assert maps.negative.head_weights is maps.also.head_weights is maps.head_weights
    kept = maps.select(steps=[0]).also
    assert torch.equal(kept["square"].raw, maps.also["square"].raw)


def test_where_the_level_is_another_maps_are_plain(pipe):
    large = pipe(PROMPT, seed=3, steps=2, height=256, width=256, trace="sharp").heatmaps[0]  # 64×64 patches
    assert large.head_weights is None
    assert large.sharp
    tall = pipe(PROMPT, seed=3, steps=2, height=96, width=64, trace="sharp").heatmaps[0]
    assert tall.head_weights is not None
    assert sharp_trace(pipe.unet.attention_sites, (16, 16), weights_of()).head_weights is None


def test_a_saved_model_keeps_them_and_another_takes_them_away(pipe, plain, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path)
    assert torch.equal(again.model.head_weights.weights, pipe.model.head_weights.weights)
    plain.save_pretrained(tmp_path)
    assert Pipeline.from_pretrained(tmp_path).model.head_weights is None
    (tmp_path / "head_weights.json").write_text("{")
    with pytest.raises(ModelError, match=r"head_weights\.json"):
        Pipeline.from_pretrained(tmp_path)


def test_fitting_is_repeatable_and_finds_what_ships_points(pipe):
    few = fit_heads(pipe, CORE, 8)
    assert torch.equal(few.weights, fit_heads(pipe, CORE, 8).weights)
    assert few.cross == pipe.model.head_weights.cross
    assert few.own == pipe.model.head_weights.own


def test_parts_that_are_no_words_keep_their_shares(pipe, plain):
    ours, theirs = (each(PROMPT, seed=3, trace="sharp").heatmaps[0] for each in (pipe, plain))
    for key in ("bos", "eos", "padding"):
        assert torch.allclose(ours[key].raw, theirs[key].raw, atol=1e-6)
        assert ours[key].unit == "share"
    assert torch.allclose(ours.token(2).raw, theirs.token(2).raw, atol=1e-6)
    assert ours["star"].unit == "probability"
    assert "probability" in repr(ours["star"])
    data = word_map_data(ours, parts=("bos",))
    assert data["words"][-1] == "bos"
    assert data["weighted"] == len(data["words"]) - 1
    assert word_map_data(theirs)["weighted"] == 0
