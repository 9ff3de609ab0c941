"""Edits of attention: what they do to probabilities, and what they do to pictures."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gobelin.attention import AttentionSite, Edit, choose_sites
from gobelin.errors import UsageError
from gobelin.look.edits import (
    Blend,
    Blending,
    Region,
    alignment,
    blended,
    excited,
    followed,
    held,
    placed,
    regional,
    reweighted,
    silenced,
)
from gobelin.pipeline import Pipeline
from gobelin.scenes import grade
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet, UNetConfig

SITE = AttentionSite(name="up.attn2", kind="cross", downscale=1, heads=2)
COARSE = AttentionSite(name="mid.attn2", kind="cross", downscale=2, heads=2)
SIZE = (4, 6)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One that knows "red" and "ring", and splits what it does not know."""
    return Tokenizer.train(["a red ring of blue and a red ring"] * 9, vocab_size=530, max_length=20)


def probabilities(site: AttentionSite = SITE, keys: int = 20, batch: int = 2) -> Tensor:
    rows, columns = site.grid(*SIZE)
    return torch.randn(batch, site.heads, rows * columns, keys).softmax(dim=-1)


def test_reweighting_multiplies_the_words_alone(tokenizer: Tokenizer) -> None:
    words, probs = tokenizer.words("a red ring and a red ring"), probabilities()
    changed = reweighted(words, {"red": 2, ("ring", 1): 0}).change(SITE, probs)
    doubled, gone = words.tokens("red"), words.tokens(("ring", 1))
    assert torch.equal(changed[..., doubled], 2 * probs[..., doubled])
    assert changed[..., gone].eq(0).all()
    rest = [token for token in range(20) if token not in (*doubled, *gone)]
    assert torch.equal(changed[..., rest], probs[..., rest])
    second = reweighted(words, {"red": 2}, rows=[1]).change(SITE, probs)
    assert torch.equal(second[0], probs[0])
    assert not torch.equal(second[1], probs[1])


def test_silenced_words_leave_their_attention_to_the_others(tokenizer: Tokenizer) -> None:
    words, probs = tokenizer.words("a red ring"), probabilities()
    changed = silenced(words, "red", "ring").change(SITE, probs)
    assert changed[..., [*words.tokens("red ring")]].eq(0).all()
    assert torch.allclose(changed.sum(dim=-1), torch.ones(()))
    assert torch.allclose(changed[..., 0] / changed[..., 1], probs[..., 0] / probs[..., 1])


@pytest.mark.parametrize("site", [SITE, COARSE], ids=["fine", "coarse"])
def test_words_are_kept_to_their_regions(tokenizer: Tokenizer, site: AttentionSite) -> None:
    words, probs = tokenizer.words("a red ring"), probabilities(site)
    edit = regional(words, [Region.box("ring", 1 / 3, 0, 1, 0.5)], SIZE, strength=3)
    rows, columns = site.grid(*SIZE)
    changed = edit.change(site, probs).reshape(2, 2, rows, columns, 20)
    before = probs.reshape(2, 2, rows, columns, 20)
    ring = words.tokens("ring")
    outside = torch.ones(rows, columns, dtype=torch.bool)
    outside[: rows // 2, columns // 3 :] = False
    assert changed[:, :, outside][..., ring].eq(0).all()
    inside, other = changed[:, :, ~outside], before[:, :, ~outside]
    assert torch.allclose(inside[..., ring] / inside[..., :1], 3 * other[..., ring] / other[..., :1], rtol=1e-4)
    assert torch.allclose(changed.sum(dim=-1), torch.ones(()))


def test_changed_words_stand_in_the_place_of_those_before_them(tokenizer: Tokenizer) -> None:
    source, target = tokenizer.words("a red ring of blue"), tokenizer.words("a zebra ring of a blue")
    mapping = alignment(source, target)
    assert len(target.tokens("zebra")) > 1
    for before, now in (("ring", "ring"), ("of", "of"), ("blue", "blue"), ("red", "zebra")):
        block = mapping[list(source.tokens(before))][:, list(target.tokens(now))]
        assert block.sum().item() == pytest.approx(len(source.tokens(before)))
    assert mapping[:, target.tokens(("a", 1))].eq(0).all()
    assert mapping[0, 0] == 1
    assert mapping[source.end, target.end] == 1
    assert mapping.shape == (20, 20)


def test_the_same_prompt_is_followed_word_for_word(tokenizer: Tokenizer) -> None:
    words = tokenizer.words("a red, ring of blue!")
    assert torch.equal(alignment(words, words), torch.eye(20))
    probs = probabilities()
    changed = followed(words, words, SIZE)[0].change(SITE, probs)
    assert torch.equal(changed[0], probs[0])
    assert torch.allclose(changed[1], probs[0])


def test_new_words_look_for_themselves_and_patches_are_followed_where_they_are_few(tokenizer: Tokenizer) -> None:
    source, target = tokenizer.words("a ring"), tokenizer.words("a red ring")
    cross, own = followed(source, target, (32, 32), cross=0.6, own=0.3)
    assert (cross.end, own.end) == (0.6, 0.3)
    assert [cross.holds(way) for way in (0, 0.59, 0.6)] == [True, True, False]
    probs = probabilities()
    changed = cross.change(SITE, probs)
    assert torch.equal(changed[1][..., target.tokens("red")], probs[1][..., target.tokens("red")])
    assert torch.allclose(changed[1][..., target.tokens("ring")], probs[0][..., source.tokens("ring")])
    patches = torch.rand(2, 2, 256, 256)
    assert torch.equal(own.change(SITE, patches)[1], patches[0])
    sites = UNet(UNetConfig.tiny()).attention_sites
    assert {(site.kind, site.downscale) for site in choose_sites(sites, own.sites)} == {("self", 2), ("self", 4)}


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


def test_what_a_changed_word_speaks_of_is_held_where_it_was(tokenizer: Tokenizer) -> None:
    source, target = tokenizer.words("a red ring of blue"), tokenizer.words("a blue ring of blue")
    wish = held(source, target, SIZE)
    assert wish is not None
    assert not wish.edited
    assert wish.rows == [1]
    probs = torch.full((2, 24, 20), 0.01)
    probs[:, 3, [*source.tokens("ring")]] = 0.5
    probs[0, 5, [*source.tokens("red")]] = probs[1, 5, [*target.tokens(("blue", 0))]] = 0.5
    probs[0, 9, [*source.tokens(("blue", 0))]] = 0.7  # the last word neither changed nor stands after one that did
    away = torch.rand(2, 6, 20)
    assert wish.loss({SITE: probs, COARSE: away}).tolist() == pytest.approx([0, 0], abs=1e-6)
    probs[1, :, [*target.tokens("ring")]] = probs[1, :, [*target.tokens("ring")]].roll(1, dims=0)
    lost = wish.loss({SITE: probs, COARSE: away})
    assert lost[0] == 0
    assert lost[1].item() == pytest.approx((0.49 / 0.73) / 2, abs=1e-5)  # one of two words, all of its peak
    assert held(tokenizer.words("a ring"), tokenizer.words("a ring and red"), SIZE) is None
    added = held(tokenizer.words("a ring"), tokenizer.words("a red ring"), SIZE)
    assert added is not None, "the word after a new one"


def test_what_is_outside_of_its_region_is_wished_away(tokenizer: Tokenizer) -> None:
    words = tokenizer.words("a red ring")
    wish = placed(words, [Region.box("ring", 0, 0, 0.5, 1)], SIZE)
    probs = torch.zeros(3, 24, 20)
    left, right, ring = 7, 10, [*words.tokens("ring")]
    probs[0, left, ring] = probs[1, right, ring] = probs[2, left, ring] = probs[2, right, ring] = 0.3
    assert wish.loss({SITE: probs, COARSE: torch.rand(3, 6, 20)}).tolist() == pytest.approx([0, 1, 0.5])


def test_outside_of_the_words_pixels_nothing_changes(tokenizer: Tokenizer) -> None:
    blend = Blend(tokens=([3], [5]), latent_size=SIZE, threshold=0.5, start=0.2)
    blending = Blending(blend)
    probs = torch.zeros(3, 2, 24, 20)
    probs[0, :, 4, 3] = 1
    probs[1, :, 11, 5] = 1
    assert blending.edit.change(SITE, probs) is probs
    latents = torch.randn(3, 4, *SIZE)
    assert blending.applied(latents, 0.1) is latents
    assert Blending(blend).applied(latents, 0.5) is latents
    result = blending.applied(latents, 0.5)
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[0:2, 3:6] = True  # around patch 4, row 0
    mask[0:3, 4:6] = True  # around patch 11, at the end of row 1
    assert torch.equal(result[1][:, mask], latents[1][:, mask])
    assert torch.equal(result[1][:, ~mask], latents[0][:, ~mask])
    assert torch.equal(result[[0, 2]], latents[[0, 2]])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda words: reweighted(words, {"cat": 2}), "'cat' is not in the prompt"),
        (lambda words: reweighted(words, {"red": -1}), "the weight of 'red' is -1: give 0"),
        (lambda words: silenced(words, ("red", 3)), "'red' occurs 1 times"),
        (lambda words: Region.box("red", 0.5, 0, 0.5, 1), "the region 0.5, 0 to 0.5, 1 of 'red' is not in the picture"),
        (lambda words: Region.box("red", 0, 0, 1, 1.2), "is not in the picture"),
        (lambda words: regional(words, [], SIZE, strength=0), "the strength is 0"),
        (lambda words: reweighted(words, {"red": float("nan")}), "the weight of 'red' is nan"),
        (
            lambda words: regional(words, [], (2, 2)).change(SITE, probabilities()),
            "for latents of 2×2, but up.attn2 has 24",
        ),
        (lambda words: followed(words, words, SIZE)[0].change(SITE, probabilities(batch=1)), "of a batch of 1"),
        (lambda words: followed(words, words, SIZE, cross=1.5), "cross is 1.5: give a share of the way"),
        (lambda words: excited(words, latent_size=SIZE), "no word given"),
        (lambda words: blended(words, words, ["cat"], SIZE), "'cat' is not in the prompt"),
    ],
)
def test_what_cannot_be_done_is_said(tokenizer: Tokenizer, ask, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(tokenizer.words("a red ring"))


@pytest.fixture(scope="module")
def pipe(trained) -> Pipeline:
    return Pipeline.from_pretrained(trained)


def test_an_edit_that_changes_nothing_changes_no_bit(pipe: Pipeline) -> None:
    plain = pipe("a red circle", seed=4)
    seen: set[AttentionSite] = set()

    def watched(site: AttentionSite, probs: Tensor) -> Tensor:
        seen.add(site)
        return probs

    assert torch.equal(pipe("a red circle", seed=4, edit=watched).latents, plain.latents)
    assert {site.kind for site in seen} == {"cross"}
    words = pipe.tokenizer.words("a red circle")
    assert not torch.equal(pipe("a red circle", seed=4, edit=silenced(words, "red")).latents, plain.latents)


def test_edits_compose_in_their_order_and_hold_for_their_part_of_the_way(pipe: Pipeline) -> None:
    ways: dict[str, int] = {}

    def counted(name: str, **part: float) -> Edit:
        def change(site: AttentionSite, probs: Tensor) -> Tensor:
            ways[name] = ways.get(name, 0) + 1
            return probs

        return Edit(change=change, sites="mid*attn2", **part)

    edits = [counted("all"), counted("early", end=0.5), counted("late", start=0.5), counted("never", end=0.0)]
    pipe("a red circle", steps=4, sampler="euler", edit=edits)
    assert ways == {"all": 4, "early": 2, "late": 2}

    words = pipe.tokenizer.words("a red circle")
    plain = pipe("a red circle", steps=4).latents
    heavier, lighter = reweighted(words, {"red": 4}), reweighted(words, {"red": 0.25})
    assert not torch.equal(pipe("a red circle", steps=4, edit=heavier).latents, plain)
    assert torch.equal(pipe("a red circle", steps=4, edit=[heavier, lighter]).latents, plain)


def test_an_edit_in_place_is_an_edit_and_what_is_no_probability_is_refused(pipe: Pipeline) -> None:
    def in_place(site: AttentionSite, probs: Tensor) -> Tensor:
        probs[..., 0] = 0
        return probs

    plain, changed = (pipe("a red circle", edit=edit, trace=True) for edit in ((), in_place))
    assert not torch.equal(changed.latents, plain.latents)
    assert changed.heatmaps[0].shares()["bos"] == 0
    assert changed.settings[0]["edited"] is True
    assert "edited" not in plain.settings[0]
    with pytest.raises(
        UsageError, match=r"an edit gave back NoneType at down.*expected probabilities \[1, 2, 256, 32\]"
    ):
        pipe("a red circle", edit=lambda site, probs: None)
    with pytest.raises(UsageError, match=r"an edit gave back \[1, 2, 256\]"):
        pipe("a red circle", edit=lambda site, probs: probs.sum(dim=-1))


def test_prompt_to_prompt_starts_from_one_noise_and_keeps_the_first_picture(pipe: Pipeline) -> None:
    result = pipe.edit("a red circle", "a blue circle", seed=5, steps=4)
    assert [settings["seed"] for settings in result.settings] == [5, 5]
    alone = pipe("a red circle", seed=5, steps=4)
    assert torch.allclose(result.latents[:1], alone.latents, atol=1e-4)
    same = pipe.edit("a red circle", "a red circle", seed=5, steps=4)
    assert torch.allclose(same.latents[1], same.latents[0], atol=1e-4)
    louder = pipe.edit(
        "a red circle", "a blue circle", seed=5, steps=4, weights={"blue": 3}, edit=lambda _, probs: probs
    )
    assert not torch.equal(louder.latents[1], pipe.edit("a red circle", "a blue circle", seed=5, steps=4).latents[1])
    assert torch.equal(louder.latents[0], pipe.edit("a red circle", "a blue circle", seed=5, steps=4).latents[0])
    with pytest.raises(UsageError, match="an edit paints two pictures: leave out count"):
        pipe.edit("a red circle", "a blue circle", count=2)
    with pytest.raises(UsageError, match="about picture 1 of a batch of 1"):
        pipe("a red circle", edit=Blend(tokens=([1], [1]), latent_size=(16, 16)))


def test_a_changed_word_changes_less_of_the_picture_than_a_picture_by_itself() -> None:
    shipped = Pipeline.from_pretrained()
    before, after = "a red circle left of a blue square", "a green circle left of a blue square"
    apart = {"followed": 0.0, "by itself": 0.0}
    for seed in range(4):
        pair = shipped.edit(before, after, seed=seed, steps=8, sampler="dpmpp_2m").latents
        itself = shipped(after, seed=seed, steps=8, sampler="dpmpp_2m").latents[0]
        apart["followed"] += (pair[1] - pair[0]).square().mean().item()
        apart["by itself"] += (itself - pair[0]).square().mean().item()
    assert 0 < apart["followed"] < 0.8 * apart["by itself"]


def test_what_is_held_moves_the_second_picture_alone(pipe: Pipeline) -> None:
    plain, moved = (pipe.edit("a red circle", "a blue circle", seed=5, steps=4, hold=hold).latents for hold in (0, 1))
    assert torch.allclose(moved[0], plain[0], atol=1e-4)
    assert not torch.allclose(moved[1], plain[1], atol=1e-2)
    added = pipe.edit("a circle", "a circle and a ring", seed=5, steps=2, hold=1).latents
    assert torch.equal(added, pipe.edit("a circle", "a circle and a ring", seed=5, steps=2).latents), "nothing to hold"


def test_a_word_is_painted_in_its_region() -> None:
    shipped = Pipeline.from_pretrained()
    prompt = "a red circle"
    words, size = shipped.tokenizer.words(prompt), shipped.latent_size()
    for left, top in ((0.0, 0.0), (0.5, 0.5)):
        region = [Region.box("red circle", left, top, left + 0.5, top + 0.5)]
        edits = [regional(words, region, size), placed(words, region, size)]
        image = shipped(prompt, seed=2, edit=edits).images[0]
        (seen,) = grade(image)
        assert (left * 64 <= seen.x <= left * 64 + 32, top * 64 <= seen.y <= top * 64 + 32) == (True, True)


def test_a_blend_leaves_the_rest_of_the_picture_as_it_was(pipe: Pipeline) -> None:
    source, target = pipe.tokenizer.words("a red circle"), pipe.tokenizer.words("a blue circle")
    blend = replace(blended(source, target, ["red", "blue"], pipe.latent_size()), threshold=0.99)
    latents = pipe(["a red circle", "a blue circle"], seed=[5, 5], steps=4, edit=blend).latents
    kept = torch.eq(latents[0], latents[1]).all(dim=0)
    assert 0 < kept.sum() < kept.numel()


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
