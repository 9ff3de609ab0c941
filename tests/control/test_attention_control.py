"""Edits of attention: what they do to probabilities, and what they do to pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from tests.control.conftest import COARSE, SITE, SIZE
from torch import Tensor

from gobelin.attention import AttentionSite, Edit, choose_sites
from gobelin.control.alignment import alignment
from gobelin.control.attention_control import (
    Blend,
    Blending,
    FlowEdit,
    Push,
    Region,
    changed_words,
    followed,
    regional,
    reweighted,
    silenced,
    tokens_of,
)
from gobelin.control.attention_guidance import excited
from gobelin.errors import UsageError
from gobelin.pipeline import Pipeline
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet, UNetConfig


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
        (lambda words: excited(words, "red", latent_size=SIZE, strength=-1), "the strength is -1: give 0"),
        (lambda words: tokens_of(words, words, ["cat"]), "'cat' is not in the prompt"),
    ],
)
def test_what_cannot_be_done_is_said(tokenizer: Tokenizer, ask, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(tokenizer.words("a red ring"))


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


def test_an_edit_keeps_the_first_picture(pipe: Pipeline) -> None:
    result = pipe.edit("a red circle", "a blue circle", seed=5, steps=4)
    assert [settings["seed"] for settings in result.settings] == [5, 5]
    alone = pipe("a red circle", seed=5, steps=4)
    assert torch.equal(result.latents[:1], alone.latents)
    assert result.settings[0] == alone.settings[0]
    assert result.settings[1]["edited"] is True
    same = pipe.edit("a red circle", "a red circle", seed=5, steps=4)
    assert torch.allclose(same.latents[1], same.latents[0], atol=1e-4)
    louder = pipe.edit(
        "a red circle", "a blue circle", seed=5, steps=4, reweight={"blue": 3}, edit=lambda _, probs: probs
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
    options = {"steps": 8, "sampler": "dpmpp_2m"}
    changed = {"alone": 0.0, "edit": 0.0, "by itself": 0.0}
    for seed in range(4):
        first, edited = shipped.edit(before, after, seed=seed, **options).images
        _, alone = shipped.edit(before, after, seed=seed, together=True, own=0.4, push=0, blend=(), **options).images
        (itself,) = shipped(after, seed=seed, **options).images
        for name, picture in (("alone", alone), ("edit", edited), ("by itself", itself)):
            apart = np.abs(np.asarray(picture, np.float32) - np.asarray(first, np.float32))
            changed[name] += (apart.max(axis=-1) > 48).mean()  # levels of 255
    assert 0 < changed["edit"] < 0.7 * changed["by itself"]
    assert 0 < changed["alone"] < 0.7 * changed["by itself"]


def test_changed_words_are_those_that_the_other_prompt_has_not(tokenizer: Tokenizer) -> None:
    source, target = tokenizer.words("a red ring, a blue circle"), tokenizer.words("a red square and a blue circle")
    assert changed_words(source, target) == ([*source.tokens("ring")], [*target.tokens("square and")])
    assert changed_words(source, source) == ([], [])


def test_two_pictures_may_be_painted_together(pipe: Pipeline) -> None:
    alone = pipe("a red circle", seed=5, steps=4)
    result = pipe.edit("a red circle", "a blue circle", seed=5, steps=4, together=True)
    assert torch.allclose(result.latents[:1], alone.latents, atol=1e-4)
    assert not torch.equal(result.latents[1], alone.latents[0])
    same = pipe.edit("a red circle", "a red circle", seed=5, steps=4, together=True)
    assert torch.allclose(same.latents[1], same.latents[0], atol=1e-4)
    with pytest.raises(UsageError, match="cannot be painted together with another"):
        pipe.edit("a red circle", "a blue circle", init_image=alone.images[0], together=True)


def test_a_picture_of_ones_own_is_changed(pipe: Pipeline) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 81, 3), np.uint8))
    result = pipe.edit("a red circle", "a blue circle", init_image=picture, seed=5, steps=4, trace=True)
    fitted = picture.resize((80, 68), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(fitted))
    assert result.images[1].size == (80, 68)
    assert len(result.heatmaps) == 2
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None] / 127.5 - 1
        latents = pipe.vae.config.scaling_factor * pipe.vae.encode(pixels).mean
    assert torch.allclose(result.latents[:1], latents, atol=1e-4)
    less = pipe.edit("a red circle", "a blue circle", init_image=picture, seed=5, steps=4, strength=0.25)
    changed = [(each.latents[1] - latents[0]).square().mean() for each in (less, result)]
    assert 0 < changed[0] < changed[1]
    with pytest.raises(UsageError, match="the strength is 0: give more than 0"):
        pipe.edit("a red circle", "a blue circle", init_image=picture, steps=4, strength=0)


def test_outside_of_a_mask_no_pixel_changes(pipe: Pipeline) -> None:
    hole = np.zeros((64, 64), np.uint8)
    hole[16:48, 16:32] = 255
    options = {"seed": 5, "steps": 4, "blend": ()}
    edited = pipe.edit("a red circle", "a blue circle", mask=Image.fromarray(hole), **options)
    apart = torch.ne(*edited.latents).any(dim=0)
    assert apart[4:12, 4:8].all()
    assert apart.sum() == 8 * 4, "a latent is four pixels wide"
    first, second = edited.images
    differ = (np.asarray(first) != np.asarray(second)).any(axis=-1)
    assert differ[hole > 0].any()
    assert not differ[hole == 0].any()
    first, second = pipe.edit("a red circle", "a blue circle", **options).images
    assert (np.asarray(first) != np.asarray(second)).any(axis=-1)[hole == 0].any()


def test_finished_pictures_are_half_of_a_batch(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"\[2, 4, 16, 16\] are edited in a batch of 2: expected half as many"):
        pipe(["a red circle", "a blue circle"], edit=FlowEdit(latents=torch.zeros(2, 4, 16, 16)))
    picture = torch.randn(1, 4, 16, 16)
    with pytest.raises(UsageError, match="not noise: leave out the start latents"):
        pipe(["a red circle"] * 2, latents=picture.repeat(2, 1, 1, 1), edit=FlowEdit(latents=picture))
    paper, ours = (
        pipe(["a red circle", "a blue circle"], steps=4, edit=FlowEdit(latents=picture, gain=gain)).latents
        for gain in (0.0, 0.45)
    )
    assert torch.equal(paper[:1], picture)
    assert (ours[1] - picture[0]).square().mean() > (paper[1] - picture[0]).square().mean() > 0


def test_a_push_adds_the_way_from_one_text_to_the_other(pipe: Pipeline) -> None:
    latents = torch.randn(2, 4, *pipe.latent_size(), generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "a blue circle"]

    def prediction(*edit: Push, guidance: float = 2.0) -> torch.Tensor:
        step = next(iter(pipe.stream(prompts, seed=[0, 0], latents=latents, steps=2, guidance=guidance, edit=edit)))
        return step.denoised

    plain, pushed = prediction(), prediction(Push(strength=0.5))
    assert torch.equal(pushed[0], plain[0])
    texts = [next(iter(pipe.stream([text] * 2, latents=latents, steps=2, guidance=1.0))).denoised for text in prompts]
    way = texts[1][1] - texts[0][1]
    assert torch.allclose(pushed[1] - plain[1], 0.5 * way, atol=1e-4)
    assert way.abs().max() > 1e-3


def test_a_blend_leaves_the_rest_of_the_picture_as_it_was(pipe: Pipeline) -> None:
    source, target = pipe.tokenizer.words("a red circle"), pipe.tokenizer.words("a blue circle")
    tokens = tokens_of(source, target, ["red", "blue"])
    assert tokens == changed_words(source, target)
    blend = Blend(tokens=tokens, latent_size=pipe.latent_size(), threshold=0.99)
    latents = pipe(["a red circle", "a blue circle"], seed=[5, 5], steps=4, edit=blend).latents
    kept = torch.eq(latents[0], latents[1]).all(dim=0)
    assert 0 < kept.sum() < kept.numel()
