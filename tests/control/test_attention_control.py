"""Attention control: what it does to probabilities of prompts of any length, and what it does to images."""

from collections.abc import Callable

import pytest
import torch
from tests.control.conftest import COARSE, SELF, SITE, batch_of, changed, probabilities
from torch import Tensor

from gobelin.attention import AttentionEdit, AttentionSite, choose_sites
from gobelin.control import (
    Batch,
    LocalBlend,
    Region,
    attend_and_excite,
    prompt_to_prompt,
    regional_attention,
    reweight,
    suppress,
)
from gobelin.control.batch import attach_controls
from gobelin.errors import UsageError
from gobelin.pipeline import Pipeline
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.words import Words

LONG = "a red ring " * 15  # of three chunks of 18 tokens


def chunked(tokenizer: Tokenizer, prompt: str) -> Words:
    """Words in as many chunks as they need."""
    tokens = tokenizer.tokens(prompt)
    room = tokenizer.max_length - 2
    return tokenizer.words_of(prompt, [tokens[at : at + room] for at in range(0, max(1, len(tokens)), room)])


def test_reweight_multiplies_the_words_alone(tokenizer: Tokenizer) -> None:
    words = tokenizer.words("a red ring and a red ring")
    batch = batch_of(words, words)
    probs = probabilities(batch)
    found = changed(reweight({"red": 2, ("ring", 1): 0}), batch, probs)
    doubled, gone = words.tokens("red"), words.tokens(("ring", 1))
    assert torch.equal(found[..., doubled], 2 * probs[..., doubled])
    assert found[..., gone].eq(0).all()
    rest = [token for token in range(20) if token not in (*doubled, *gone)]
    assert torch.equal(found[..., rest], probs[..., rest])
    second = changed(reweight({"red": 2}, rows=[1]), batch, probs)
    assert torch.equal(second[0], probs[0])
    assert not torch.equal(second[1], probs[1])
    assert torch.equal(changed(reweight({"red": 1}), batch, probs), probs)
    assert torch.equal(changed(reweight({}), batch, probs), probs)


def test_each_prompt_is_searched_for_the_words_by_itself(tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.words(text) for text in ("a red ring", "blue", "ring of a red")]
    batch = batch_of(*prompts)
    probs = probabilities(batch)
    found = changed(reweight({"red": 3}), batch, probs)
    assert torch.equal(found[1], probs[1]), "a prompt without the word is left alone"
    for row in (0, 2):
        place = prompts[row].tokens("red")
        assert torch.equal(found[row][..., place], 3 * probs[row][..., place])
    with pytest.raises(UsageError, match="'red' is not in the prompt, whose words are blue"):
        changed(reweight({"red": 3}, rows=[1]), batch, probs)
    with pytest.raises(UsageError, match="no prompt of the batch has 'red' and 'blue' together"):
        changed(reweight({"red": 1, "blue": 1}), batch_of(tokenizer.words("red"), tokenizer.words("blue")), probs)


def test_suppressed_words_leave_their_attention_to_the_others(tokenizer: Tokenizer) -> None:
    words = tokenizer.words("a red ring")
    batch = batch_of(words, words)
    probs = probabilities(batch)
    found = changed(suppress("red", "ring"), batch, probs)
    assert found[..., [*words.tokens("red ring")]].eq(0).all()
    assert torch.allclose(found.sum(dim=-1), torch.ones(()))
    assert torch.allclose(found[..., 0] / found[..., 1], probs[..., 0] / probs[..., 1])


@pytest.mark.parametrize("site", [SITE, COARSE], ids=["fine", "coarse"])
def test_words_are_kept_to_their_regions(tokenizer: Tokenizer, site: AttentionSite) -> None:
    words = tokenizer.words("a red ring")
    batch = batch_of(words, words)
    probs = probabilities(batch, site)
    control = regional_attention({"ring": Region.box(1 / 3, 0, 1, 0.5)}, strength=3)
    rows, columns = batch.grid(site)
    found = changed(control, batch, probs, site).reshape(2, 2, rows, columns, 20)
    before = probs.reshape(2, 2, rows, columns, 20)
    ring = words.tokens("ring")
    outside = torch.ones(rows, columns, dtype=torch.bool)
    outside[: rows // 2, columns // 3 :] = False
    assert found[:, :, outside][..., ring].eq(0).all()
    inside, other = found[:, :, ~outside], before[:, :, ~outside]
    assert torch.allclose(inside[..., ring] / inside[..., :1], 3 * other[..., ring] / other[..., :1], rtol=1e-4)
    assert torch.allclose(found.sum(dim=-1), torch.ones(()))


def test_a_word_may_be_in_several_regions(tokenizer: Tokenizer) -> None:
    batch = batch_of(tokenizer.words("a red ring"))
    probs = probabilities(batch)
    halves = [Region.box(0, 0, 0.5, 1), Region.box(0.5, 0, 1, 1)]
    both = changed(regional_attention({"ring": halves}), batch, probs)
    assert torch.allclose(both, changed(regional_attention({"ring": Region.box(0, 0, 1, 1)}), batch, probs))


def test_the_same_prompt_is_followed_word_for_word(tokenizer: Tokenizer) -> None:
    words = tokenizer.words("a red, ring of blue!")
    batch = batch_of(words, words)
    probs = probabilities(batch)
    found = changed(prompt_to_prompt(), batch, probs)
    assert torch.equal(found[0], probs[0])
    assert torch.allclose(found[1], probs[0])
    turned = changed(prompt_to_prompt(rows=(1, 0)), batch, probs)
    assert torch.equal(turned[1], probs[1])
    assert torch.allclose(turned[0], probs[1])


def test_new_words_look_for_themselves_and_patches_are_followed_where_they_are_few(tokenizer: Tokenizer) -> None:
    source, target = tokenizer.words("a ring"), tokenizer.words("a red ring")
    sites = UNet(UNetConfig.tiny()).attention_sites
    batch = Batch(words=(source, target), latent_size=(32, 32), channels=4, sites=sites)
    cross, own = attach_controls([prompt_to_prompt(cross_replace=0.6, self_replace=0.3)], batch).edits
    assert (cross.end, own.end) == (0.6, 0.3)
    assert [cross.holds(progress) for progress in (0, 0.59, 0.6)] == [True, True, False]
    probs = probabilities(batch_of(source, target))
    found = cross.change(SITE, probs)
    assert torch.equal(found[1][..., target.tokens("red")], probs[1][..., target.tokens("red")])
    assert torch.allclose(found[1][..., target.tokens("ring")], probs[0][..., source.tokens("ring")])
    patches = torch.rand(2, 2, 256, 256)
    assert torch.equal(own.change(SELF, patches)[1], patches[0])
    assert {(site.kind, site.downscale) for site in choose_sites(sites, own.sites)} == {("self", 2), ("self", 4)}


# Every pair of lengths: the batch is as long as its longest prompt, and as a negative prompt that may be longer still.
@pytest.mark.parametrize("padded", [0, 20], ids=["own", "longer"])
@pytest.mark.parametrize("first", ["a red ring", LONG], ids=["short", "long"])
@pytest.mark.parametrize("second", ["a blue ring", LONG + "of a blue"], ids=["short", "long"])
@pytest.mark.parametrize(
    "control",
    [
        reweight({"ring": 2}),
        suppress("ring"),
        regional_attention({"ring": Region.box(0, 0, 0.5, 0.5)}),
        prompt_to_prompt(),
        LocalBlend(words=["ring"]),
    ],
    ids=lambda control: getattr(control, "name", "local_blend"),
)
def test_prompts_of_any_lengths_are_controlled(
    tokenizer: Tokenizer, control, first: str, second: str, padded: int
) -> None:
    words = [chunked(tokenizer, text) for text in (first, second)]
    length = max(one.length for one in words) + padded
    batch = batch_of(*(one.at_length(length) for one in words))
    assert batch.words[0].length == length
    probs = probabilities(batch)
    for site in (SITE, COARSE):
        found = changed(control, batch, probabilities(batch, site), site)
        assert found.isfinite().all()
    found = changed(control, batch, probs)
    for row, own in enumerate(batch.words):
        assert found[row][..., list(own.part("masked"))].eq(0).all(), "nothing is given to what is masked"
    if "suppress" in repr(control) or "regional" in repr(control):
        assert torch.allclose(found.sum(dim=-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: reweight({"cat": 2}), "'cat' is not in the prompt, whose words are a, red, ring"),
        (lambda: reweight({"red": -1}), "the weight of 'red' is -1: give 0"),
        (lambda: reweight({"red": float("nan")}), "the weight of 'red' is nan"),
        (lambda: reweight({"red": "2"}), "the weight of 'red' is '?2"),
        (lambda: reweight({"red": 2}, rows=[2]), "a control is about image 2 of a batch of 2: the first is 0"),
        (lambda: suppress(("red", 3)), "'red' occurs 1 times"),
        (lambda: suppress(7), "there is no word number 7: the prompt has 3"),
        (lambda: Region.box(0.5, 0, 0.5, 1), "the region 0.5, 0 to 0.5, 1 is not in the image"),
        (lambda: Region.box(0, 0, 1, 1.2), "is not in the image"),
        (lambda: regional_attention({}, strength=0), "the strength is 0"),
        (lambda: regional_attention({}, end=1.5), "1.5: give a fraction"),
        (lambda: prompt_to_prompt(cross_replace=1.5), "cross_replace is 1.5: give a fraction"),
        (lambda: prompt_to_prompt(self_replace=float("nan")), "self_replace is nan: give a fraction"),
        (lambda: prompt_to_prompt(rows=(0, 5)), "image 5 of a batch of 2"),
        (lambda: attend_and_excite(), "no word given"),
        (lambda: attend_and_excite("red", strength=-1), "the strength is -1: give 0"),
        (lambda: LocalBlend(words=["cat"]), "'cat' is not in the prompt"),
        (lambda: LocalBlend(threshold=2), "threshold is 2: give a fraction from 0 to 1"),
        # what is no such thing at all
        (lambda: reweight("red"), "weights is 'red': give"),
        (lambda: reweight({"red": 2}, rows=1), "rows is 1: give"),
        (lambda: reweight({3.5: 2}), "give"),
        (lambda: suppress(3.5), "give"),
        (lambda: suppress(["red"]), "give"),
        (lambda: suppress(), "no word given"),
        (lambda: regional_attention({"ring": "left"}), "give"),
        (lambda: regional_attention({"ring": (0, 0, 1, 1)}), "give"),
        (lambda: regional_attention({"ring": []}), "give"),
        (lambda: Region.box("0", 0, 1, 1), "give"),
        (lambda: Region(mask=torch.zeros(3)), "give"),
        (lambda: prompt_to_prompt(rows=(0,)), "rows is .*: give"),
        (lambda: prompt_to_prompt(cross_replace="1"), "cross_replace is '?1'?: give"),
        (lambda: LocalBlend(words="red"), "words is 'red': give"),
        (lambda: LocalBlend(rows=3), "rows is 3: give"),
    ],
)
def test_what_cannot_be_done_is_said(tokenizer: Tokenizer, ask: Callable, message: str) -> None:
    words = tokenizer.words("a red ring")
    with pytest.raises(UsageError, match=message) as raised:
        attach_controls([ask()], batch_of(words, words))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("control", ["x", 3, {"red": 2}, AttentionEdit, {1, 2}, torch.zeros(3, 3)])
def test_what_is_no_control_is_refused(pipe: Pipeline, control) -> None:
    with pytest.raises(UsageError, match=r"control is .*: give") as raised:
        pipe("a red circle", control=control, steps=1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("control", [reweight, suppress, prompt_to_prompt, regional_attention, attend_and_excite])
def test_a_control_that_was_not_called_is_refused(pipe: Pipeline, control) -> None:
    with pytest.raises(UsageError) as raised:
        pipe("a red circle", control=control, steps=1)
    assert "\n" not in str(raised.value)


def test_a_control_that_changes_nothing_changes_no_bit(pipe: Pipeline) -> None:
    plain = pipe("a red circle", seed=4)
    seen: set[AttentionSite] = set()

    def watched(site: AttentionSite, probs: Tensor) -> Tensor:
        seen.add(site)
        return probs

    assert torch.equal(pipe("a red circle", seed=4, control=watched).latents, plain.latents)
    assert {site.kind for site in seen} == {"cross"}
    assert not torch.equal(pipe("a red circle", seed=4, control=suppress("red")).latents, plain.latents)


def test_edits_compose_in_their_order_and_hold_for_their_part_of_the_way(pipe: Pipeline) -> None:
    calls: dict[str, int] = {}

    def counted(name: str, **part: float) -> AttentionEdit:
        def change(site: AttentionSite, probs: Tensor) -> Tensor:
            calls[name] = calls.get(name, 0) + 1
            return probs

        return AttentionEdit(change=change, sites="mid*attn2", **part)

    edits = [counted("all"), counted("early", end=0.5), counted("late", start=0.5), counted("never", end=0.0)]
    pipe("a red circle", steps=4, sampler="euler", control=edits)
    assert calls == {"all": 4, "early": 2, "late": 2}

    plain = pipe("a red circle", seed=0, steps=4).latents
    heavier, lighter = reweight({"red": 4}), reweight({"red": 0.25})
    assert not torch.equal(pipe("a red circle", seed=0, steps=4, control=heavier).latents, plain)
    assert torch.equal(pipe("a red circle", seed=0, steps=4, control=[heavier, lighter]).latents, plain)


def test_a_change_in_place_is_a_change_and_what_is_no_probability_is_refused(pipe: Pipeline) -> None:
    def in_place(site: AttentionSite, probs: Tensor) -> Tensor:
        probs[..., 0] = 0
        return probs

    plain, found = (pipe("a red circle", seed=0, control=control, trace=True) for control in ((), in_place))
    assert not torch.equal(found.latents, plain.latents)
    assert found.heatmaps[0].shares()["bos"] == 0
    assert found.settings[0]["control"] is True
    assert "control" not in plain.settings[0]
    with pytest.raises(
        UsageError, match=r"a control returned NoneType at down.*expected probabilities \[1, 2, 256, 32\]"
    ):
        pipe("a red circle", control=lambda site, probs: None)
    with pytest.raises(UsageError, match=r"a control returned \[1, 2, 256\]"):
        pipe("a red circle", control=lambda site, probs: probs.sum(dim=-1))


@pytest.mark.parametrize(
    "control",
    [
        reweight({"red": 2, "circle": 0}),
        suppress("red", ("circle", 0)),
        regional_attention({"red circle": [Region.box(0, 0, 1, 1)] * 3}),
        prompt_to_prompt(),
        LocalBlend(words=["red"]),
        attend_and_excite("red"),
    ],
)
def test_controls_say_in_a_line_how_they_were_made(control) -> None:
    said = repr(control)
    assert "\n" not in said
    assert "tensor" not in said
    assert "function" not in said
    assert len(said) < 400
