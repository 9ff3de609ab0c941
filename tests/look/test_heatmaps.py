"""Heat maps against direct computations, DAAM's aggregation against a second one, and what cannot be asked."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests.conftest import relative_error
from torch import Tensor

from gobelin.attention import AttentionMaps, AttentionSite, Trace
from gobelin.errors import UsageError
from gobelin.look.collector import Collector
from gobelin.look.heatmaps import HeatMaps
from gobelin.look.sharp_maps import sharp_trace
from gobelin.tokenizer import Tokenizer
from gobelin.words import Words

PROMPT = "A red circle, left of a blue Circle"
LENGTH = 14
LATENT_SIZE = (6, 9)  # a picture that is not square, and sizes that do not halve evenly
CROSS = [
    AttentionSite(name=f"{part}.attn2", kind="cross", downscale=scale, heads=3)
    for part, scale in (("down", 1), ("mid_block", 2), ("up", 1))
]
SELF = AttentionSite(name="up.attn1", kind="self", downscale=1, heads=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One that splits "circle" into several tokens."""
    return Tokenizer.train(["a red left of a blue"], vocab_size=530, max_length=LENGTH + 20)


def probabilities(site: AttentionSite, keys: int, seed: int, sharpness: float) -> Tensor:
    rows, columns = site.grid(*LATENT_SIZE)
    logits = torch.randn(2, site.heads, rows * columns, keys, generator=torch.Generator().manual_seed(seed))
    return logits.mul(sharpness).softmax(dim=-1)


def steps(length: int, sharpness: float = 0.5) -> list[AttentionMaps]:
    return [
        {
            **{site: probabilities(site, length, 10 * step + number, sharpness) for number, site in enumerate(CROSS)},
            SELF: probabilities(SELF, LATENT_SIZE[0] * LATENT_SIZE[1], 10 * step + 9, sharpness),
        }
        for step in range(4)
    ]


def collected(tokenizer: Tokenizer, trace: Trace, sharpness: float = 0.5) -> HeatMaps:
    collector = Collector(trace)
    for maps in steps(tokenizer.max_length, sharpness):
        collector.add(maps if trace.per_head else {site: probs.mean(dim=1) for site, probs in maps.items()})
    return HeatMaps(
        words=tokenizer.words(PROMPT),
        maps=collector.maps(1),
        latent_size=LATENT_SIZE,
        image=Image.new("RGB", (36, 24), "grey"),
    )


@pytest.fixture
def heatmaps(tokenizer: Tokenizer) -> HeatMaps:
    return collected(tokenizer, Trace())


def directly(length: int, tokens: list[int]) -> Tensor:
    """Every step's and site's share of these tokens, enlarged one by one; then the mean."""
    large = []
    for maps in steps(length):
        for site in CROSS:
            share = maps[site][1].mean(dim=0)[:, tokens].sum(dim=-1)
            small = share.reshape(1, 1, *site.grid(*LATENT_SIZE))
            large.append(F.interpolate(small, size=(24, 36), mode="bicubic")[0, 0])
    return torch.stack(large).mean(dim=0)


def test_a_word_is_all_its_tokens_wherever_it_stands(tokenizer: Tokenizer, heatmaps: HeatMaps) -> None:
    spans = tokenizer.words(PROMPT).spans
    assert [span.word for span in spans] == ["A", "red", "circle", "left", "of", "a", "blue", "Circle"]
    assert len(spans[2].tokens) > 1
    for key, places in {
        "red": [1],
        "circle": [2, 7],
        ("circle", 0): [2],
        ("Circle", 1): [7],
        ("circle", -1): [7],
        "BLUE circle": [6, 7],
        "circle, left": [2, 3],
        "a": [0, 5],
        3: [3],
        -1: [7],
    }.items():
        tokens = [token for place in places for token in spans[place].tokens]
        assert list(heatmaps.words.tokens(key)) == tokens
        expected = directly(tokenizer.max_length, tokens)
        assert relative_error(heatmaps[key].raw, expected) < 1e-5


def test_shares_of_tokens_sum_to_one(tokenizer: Tokenizer, heatmaps: HeatMaps) -> None:
    whole = sum(heatmaps.token(position).raw for position in range(tokenizer.max_length))
    assert torch.allclose(whole, torch.ones(24, 36), atol=1e-5)
    parts = sum(heatmaps.part(part).raw for part in ("bos", "eos", "padding"))
    text = sum(heatmaps.token(position).raw for position in heatmaps.words.part("text"))
    assert torch.allclose(text, whole - parts, atol=1e-5)
    words = heatmaps[" ".join(span.word for span in heatmaps.words.spans)].raw
    comma = heatmaps.token(heatmaps.words.spans[2].tokens[-1] + 1).raw
    assert torch.allclose(words, text - comma, atol=1e-5)
    assert sum(heatmaps.shares().values()) == pytest.approx(1)
    assert heatmaps.shares()["bos"] == pytest.approx(
        torch.stack([maps[site][1][..., 0].mean() for maps in steps(tokenizer.max_length) for site in CROSS]).mean()
    )


# Two chunks of seven tokens: BOS, text, EOS and padding of each.
TWO_CHUNKS = ("bos", "text", "text", "text", "eos", "padding", "padding")
TWO_CHUNKS += ("bos", "text", "text", "text", "text", "eos", "padding")


def test_shares_count_every_chunks_bos_eos_and_padding() -> None:
    words = Words(text="", spans=(), kinds=TWO_CHUNKS)
    share = torch.arange(1.0, 15) / sum(range(1, 15))
    site = AttentionSite(name="up.attn2", kind="cross", downscale=1, heads=1)
    maps = {site: share.expand(1, 1, 54, 14)}
    heatmaps = HeatMaps(words=words, maps=maps, latent_size=LATENT_SIZE, image=Image.new("RGB", (36, 24)))
    text = (1, 2, 3, 8, 9, 10, 11)
    assert heatmaps.shares() == pytest.approx(
        {
            "text": share[list(text)].sum().item(),
            "bos": share[[0, 7]].sum().item(),
            "eos": share[[4, 12]].sum().item(),
            "padding": share[[5, 6, 13]].sum().item(),
        }
    )
    assert sum(heatmaps.shares().values()) == pytest.approx(1)
    assert heatmaps.part("text").raw.mean().item() == pytest.approx(heatmaps.shares()["text"])
    left = heatmaps.without("bos", "eos", "padding")
    assert left.shares() == pytest.approx({"text": 1, "bos": 0, "eos": 0, "padding": 0})


def test_what_is_left_out_leaves_the_others_their_proportions(heatmaps: HeatMaps) -> None:
    left = heatmaps.without("bos", "padding")
    assert left.part("bos").raw.eq(0).all()
    assert left.shares()["text"] + left.shares()["eos"] == pytest.approx(1)
    site = CROSS[0]
    before, after = heatmaps.maps[site][0, 0], left.maps[site][0, 0]
    assert torch.allclose(after[:, 1] / after[:, 2], before[:, 1] / before[:, 2])
    assert torch.equal(left.maps[SELF], heatmaps.maps[SELF])


def test_steps_heads_and_sites_can_be_chosen_and_average_to_the_whole(tokenizer: Tokenizer, heatmaps: HeatMaps) -> None:
    apart = collected(tokenizer, Trace(per_head=True, per_step=True))
    assert torch.allclose(apart["red"].raw, heatmaps["red"].raw, atol=1e-6)
    by_step = torch.stack([apart.select(steps=[step])["red"].raw for step in range(4)])
    by_head = torch.stack([apart.select(heads=[head])["red"].raw for head in range(3)])
    by_site = torch.stack([apart.select(sites=[site])["red"].raw for site in CROSS])
    for parts in (by_step, by_head, by_site):
        assert (parts[0] - parts[1]).abs().max() > 0.001
        assert torch.allclose(parts.mean(dim=0), heatmaps["red"].raw, atol=1e-6)
    one = apart.select(sites="mid*", steps=[2], heads=[1])
    assert torch.equal(one.maps[CROSS[1]][0, 0], steps(tokenizer.max_length)[2][CROSS[1]][1, 1])


def test_sharp_maps_are_what_patches_and_those_they_draw_on_agree_about(heatmaps: HeatMaps) -> None:
    there = heatmaps.select(sites=lambda site: site.downscale == 1)
    sharp = there.sharpened()
    own = heatmaps.maps[SELF][0, 0]
    for word in ("blue", "circle"):
        large = []
        for site in (CROSS[0], CROSS[2]):
            share = heatmaps.maps[site][0, 0][:, list(heatmaps.words.tokens(word))].sum(dim=-1)
            gathered = torch.stack([(own[patch] * share).sum() for patch in range(len(own))])
            small = (share * gathered / gathered.max()).reshape(1, 1, *LATENT_SIZE)
            large.append(F.interpolate(small, size=(24, 36), mode="bicubic")[0, 0])
        assert relative_error(sharp[word].raw, torch.stack(large).mean(dim=0)) < 1e-5
    assert sharp.shares() == there.shares()
    assert torch.equal(sharp.sharpened()["blue"].raw, sharp["blue"].raw)
    alike = replace(there, maps={**there.maps, SELF: torch.full_like(there.maps[SELF], 1 / len(own))}).sharpened()
    assert torch.allclose(alike["red"].raw, there["red"].raw, atol=1e-6)  # who draws on all alike adds nothing


def test_sharp_maps_come_from_the_decoders_finest_level_that_is_not_too_fine() -> None:
    def site(name: str, kind: Literal["self", "cross"], downscale: int) -> AttentionSite:
        return AttentionSite(name=name, kind=kind, downscale=downscale, heads=2)

    there = [
        site(f"{block}.attn{number}", kind, scale)
        for block, scale in (("down_blocks.0", 1), ("mid_block", 4), ("up_blocks.1", 2), ("up_blocks.2", 1))
        for number, kind in ((1, "self"), (2, "cross"))
    ]
    assert [found.name for found in sharp_trace(there, (16, 16)).sites] == ["up_blocks.2.attn1", "up_blocks.2.attn2"]
    assert [found.name for found in sharp_trace(there, (48, 32)).sites] == ["up_blocks.2.attn1", "up_blocks.2.attn2"]
    assert [found.name for found in sharp_trace(there, (64, 64)).sites] == ["up_blocks.1.attn1", "up_blocks.1.attn2"]
    assert [found.name for found in sharp_trace(there, (512, 512)).sites] == ["up_blocks.1.attn1", "up_blocks.1.attn2"]


def test_steps_that_were_not_traced_do_not_count(tokenizer: Tokenizer) -> None:
    collector = Collector(Trace(start=0.5))
    first, second = ({CROSS[0]: maps[CROSS[0]].mean(dim=1)} for maps in steps(tokenizer.max_length)[:2])
    for maps in ({}, first, {}, second):
        collector.add(maps)
    assert torch.allclose(collector.maps(1)[CROSS[0]][0, 0], (first[CROSS[0]][1] + second[CROSS[0]][1]) / 2)


def test_memory_does_not_grow_with_the_steps(tokenizer: Tokenizer) -> None:
    collector = Collector(Trace(per_head=True))
    sizes = []
    for maps in steps(tokenizer.max_length):
        collector.add(maps)
        sizes.append(sum(probs.numel() for probs in collector.maps(0).values()))
    assert len(set(sizes)) == 1


def daams_own(maps: list[AttentionMaps], tokens: list[int]) -> Tensor:
    """DAAM as its package computes it, written a second time: per layer and head, summed over time."""
    totals: dict[tuple[str, int], Tensor] = {}
    for step in maps:
        for site in CROSS:
            if site.name.startswith("mid_block"):  # locate_middle_block is off
                continue
            for head in range(site.heads):
                heat = step[site][1, head].T.reshape(-1, *site.grid(*LATENT_SIZE))
                totals[site.name, head] = totals.get((site.name, head), 0) + heat
    merged = [F.interpolate(heat[:, None], size=LATENT_SIZE, mode="bicubic").clamp_(min=0) for heat in totals.values()]
    word = torch.stack(merged).mean(dim=0)[:, 0][tokens].mean(dim=0)
    return F.interpolate(word[None, None], size=(24, 36), mode="bicubic")[0, 0]


@pytest.mark.parametrize("key", ["red", "circle", ("circle", 1)], ids=str)
def test_daams_aggregation_is_reproduced(tokenizer: Tokenizer, key: str | tuple[str, int]) -> None:
    heatmaps = collected(tokenizer, Trace(per_head=True), sharpness=3)  # so sharp that bicubic curves fall below 0
    expected = daams_own(steps(tokenizer.max_length, 3), list(heatmaps.words.tokens(key))) / 4
    assert relative_error(heatmaps.daam(key).raw, expected) < 1e-5


def test_a_patch_tells_the_words_behind_it(heatmaps: HeatMaps) -> None:
    ranked = heatmaps.words_in((8, 4, 20, 9))
    shares = {number: heatmaps[number].raw[4:9, 8:20].mean().item() for number in range(8)}
    total = sum(shares.values())
    assert [share for _, share in ranked] == pytest.approx(sorted((s / total for s in shares.values()), reverse=True))
    assert ranked[0][0] == heatmaps.words.spans[max(shares, key=lambda number: shares[number])]
    assert heatmaps.words_at(3, 2) == heatmaps.words_in((3, 2, 4, 3))


def test_a_patch_tells_the_patches_that_it_draws_on(tokenizer: Tokenizer, heatmaps: HeatMaps) -> None:
    row, column = 4, 7
    seen = torch.stack([maps[SELF][1].mean(dim=0)[row * 9 + column] for maps in steps(tokenizer.max_length)])
    expected = F.interpolate(seen.mean(dim=0).reshape(1, 1, 6, 9), size=(24, 36), mode="bicubic")[0, 0].clamp(min=0)
    for x, y in ((28, 16), (31, 19)):  # both corners of the same patch
        assert relative_error(heatmaps.patches_for(x, y).raw, expected) < 1e-5


def test_all_directions_come_at_once(heatmaps: HeatMaps) -> None:
    arrays = heatmaps.arrays()
    assert arrays.words == [span.word for span in heatmaps.words.spans]
    for number in range(8):
        assert np.array_equal(arrays.words_to_image[number], heatmaps[number].raw.numpy())
    assert arrays.image_to_words.shape == (24, 36, 8)
    for x, y in ((3, 2), (35, 23)):
        ranked = {span.start: share for span, share in heatmaps.words_at(x, y)}
        expected = [ranked[span.start] for span in heatmaps.words.spans]
        assert arrays.image_to_words[y, x].tolist() == pytest.approx(expected, abs=1e-5)
    assert np.allclose(arrays.image_to_words.sum(axis=2), 1, atol=1e-5)
    assert arrays.patches_to_patches is not None
    assert arrays.patches_to_patches.shape == (6, 9, 6, 9)
    assert np.allclose(arrays.patches_to_patches.sum(axis=(2, 3)), 1, atol=1e-5)
    seen = heatmaps.patches_for(29, 17).raw.numpy()[2::4, 2::4]  # the patch in row 4, column 7
    assert np.corrcoef(seen.ravel(), arrays.patches_to_patches[4, 7].ravel())[0, 1] > 0.9

    some = heatmaps.arrays(["blue circle", ("circle", 0), "bos"])
    assert some.words == ["blue circle", "circle", "BOS"]
    assert np.array_equal(some.words_to_image[2], heatmaps.part("bos").raw.numpy())
    assert heatmaps.arrays([]).image_to_words.shape == (24, 36, 0)
    assert heatmaps.select(sites="*attn2").arrays().patches_to_patches is None


def test_masks_of_all_words_are_each_words_mask(heatmaps: HeatMaps) -> None:
    masks = heatmaps.masks()
    assert masks.shape == (8, 24, 36)
    assert all(torch.equal(masks[number], heatmaps[number].mask()) for number in range(8))
    assert torch.equal(heatmaps.masks(["blue"], 0.7)[0], heatmaps["blue"].mask(0.7))
    assert heatmaps.masks([]).shape == (0, 24, 36)
    with pytest.raises(UsageError, match="'cat' is not in the prompt"):
        heatmaps.masks(["red", "cat"])


def test_values_are_for_display(heatmaps: HeatMaps) -> None:
    values = heatmaps["red"].values
    assert values.min() == 0
    assert values.max() == 1
    assert torch.equal(heatmaps["red"].mask(0.4), values > 0.4)
    even = replace(heatmaps["red"], raw=torch.full((24, 36), 0.3))
    assert even.values.eq(0).all()
    assert heatmaps["red"].overlay().size == (36, 24)
    assert heatmaps["red"].overlay(90).size == (90, 60)
    assert heatmaps["red"]._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda maps: maps["cat"], "'cat' is not in the prompt, whose words are A, red, circle, left, of, a, blue"),
        (lambda maps: maps["red blue"], "'red blue' is not in the prompt"),
        (lambda maps: maps[""], "'' is not in the prompt"),
        (lambda maps: maps["circle", 2], "'circle' occurs 2 times"),
        (lambda maps: maps[8], "no word number 8: the prompt has 8"),
        (lambda maps: maps.token(99), r"no token 99: positions are 0 to 33"),
        (lambda maps: maps.part("middle"), "unknown part 'middle': the choices are bos, text, eos, padding"),
        (lambda maps: maps.select(steps=[3]), r"step 3 asked for, but steps were averaged.*per_step=True"),
        (lambda maps: maps.select(heads=[1]), r"head 1 asked for, but heads were averaged"),
        (lambda maps: maps.select(sites="nowhere"), r"'nowhere' matches no attention.*down\.attn2"),
        (lambda maps: maps.select(sites="*attn1")["red"], r"no attention to words \(attn2\) was traced"),
        (lambda maps: maps.select(sites="*attn2").patches_for(1, 1), r"no attention to patches \(attn1\) was traced"),
        (lambda maps: maps.sharpened(), "no attention to patches was traced where mid_block.attn2 is: trace its attn1"),
        (lambda maps: maps.words_at(36, 0), "is not in the image of 36×24 pixels"),
        (lambda maps: maps.words_in((5, 5, 5, 9)), "is not in the image"),
        (lambda maps: maps.patches_for(0, 24), "the pixel 0, 24 is not in the image"),
    ],
)
def test_what_is_not_there_is_said(heatmaps: HeatMaps, ask, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(heatmaps)


def test_a_step_or_head_beyond_the_last_is_said(tokenizer: Tokenizer) -> None:
    apart = collected(tokenizer, Trace(per_head=True, per_step=True))
    with pytest.raises(UsageError, match="there is no head 3: choose from 0 to 2"):
        apart.select(heads=[3])
    with pytest.raises(UsageError, match="there is no step 4: choose from 0 to 3"):
        apart.select(steps=[0, 4])
