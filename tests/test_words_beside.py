"""Words beside the prompt and words of the negative one: their maps, and that they change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gobelin.attention import Trace, attention_probs
from gobelin.control import reweight
from gobelin.errors import UsageError
from gobelin.guidance import classifier_free_guidance, guidance_interval
from gobelin.look.heatmaps import HeatMaps
from gobelin.painting import Result
from gobelin.pipeline import Pipeline

PROMPT = "a red circle and a blue ring"
ALSO = ("dog", "a shadow", "円 🟥", "circle", "(star:1.3)", "x" * 9)


@pytest.fixture(scope="module")
def pipe(trained: Path) -> Pipeline:
    return Pipeline.from_pretrained(trained)


def paint(pipe: Pipeline, trace: Any, guidance: float = 4.0, **settings: Any) -> Result:
    return pipe(PROMPT, seed=3, steps=3, guidance=guidance, trace=trace, **settings)


def same_maps(one: HeatMaps, other: HeatMaps) -> bool:
    return one.maps.keys() == other.maps.keys() and all(
        torch.equal(one.maps[site], other.maps[site]) for site in one.maps
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two lengths": {"prompt": [PROMPT, "a star"]},
    "a negative prompt": {"negative_prompt": "a blue star"},
    "without guidance": {"guidance": 1.0},
    "a control": {"control": reweight({"red": 3.0}), "negative_prompt": "green"},
    "guided for a while": {"guidance": guidance_interval(classifier_free_guidance(4.0), 0.3, 0.9)},
    "merged patches": {"merge_tokens": 0.5, "cache_interval": 2},
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("trace", [{}, {"per_head": True}, {"sharp": True}], ids=str)
def test_what_is_traced_beside_changes_no_bit(pipe: Pipeline, case: str, trace: dict[str, Any]) -> None:
    settings = {"guidance": 4.0, "prompt": PROMPT, "seed": 3, "steps": 3, **SETTINGS[case]}
    plain = pipe(**settings)
    alone, more = (pipe(**settings, trace=Trace(**trace, **added)) for added in ({}, {"also": ALSO, "negative": True}))
    assert torch.equal(plain.latents, more.latents)
    assert [image.tobytes() for image in plain.images] == [image.tobytes() for image in more.images]
    for one, other in zip(alone.heatmaps, more.heatmaps, strict=True):
        assert same_maps(one, other)
        assert torch.equal(
            one["red"].raw if "red" in one.words.text else one[0].raw, other[1 if "red" in one.words.text else 0].raw
        )
        assert one.shares() == other.shares()
        assert one.entropy() == other.entropy()
        assert [span.word for span in other.also.words.spans] == [
            "dog",
            "a shadow",
            "円 🟥",
            "circle",
            "star",
            "x" * 9,
        ]
        assert (other.negative_traced is None) == (case == "without guidance")


@torch.no_grad()
def test_their_maps_are_those_of_their_keys_beside_the_prompts(pipe: Pipeline) -> None:
    """By hand, from hooks on the projections of the last step's pass: keys of the word's own text, no BOS or EOS."""
    result = paint(pipe, Trace(per_head=True, per_step=True, also=["blue star", "dog"]), guidance=1.0)
    site = next(iter(result.heatmaps[0].maps))
    layer = pipe.unet.get_submodule(site.name)
    steps = list(pipe.start(PROMPT, seed=3, steps=3, guidance=1.0))
    timestep = torch.tensor([steps[2].timestep])
    seen: dict[str, torch.Tensor] = {}
    handles = [
        getattr(layer, name).register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        for name in ("to_q", "to_k")
    ]
    pipe.unet(steps[1].latents, timestep, pipe.encode_text(PROMPT).embeddings)
    for handle in handles:
        handle.remove()
    query, key = (seen[name].unflatten(-1, (site.heads, -1)).transpose(1, 2) for name in ("to_q", "to_k"))
    for word in ("blue star", "dog"):
        words = pipe.words(word)
        own = pipe.encode_text(word).embeddings[:, list(words.part("text"))]
        beside = torch.cat([key, layer.to_k(own).unflatten(-1, (site.heads, -1)).transpose(1, 2)], dim=2)
        expected = attention_probs(query, beside)[0, :, :, key.shape[2] :]
        also = result.heatmaps[0].also
        found = also.maps[site][2][..., list(also.words.tokens(word))]
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_words_map_does_not_depend_on_other_words_beside(pipe: Pipeline) -> None:
    alone, among = (paint(pipe, Trace(also=words)).heatmaps[0].also["dog"].raw for words in (["dog"], ALSO))
    assert torch.allclose(alone, among, atol=1e-6)
    assert 0 < alone.max() < 1


def test_a_words_map_beside_a_prompt_does_not_depend_on_a_longer_neighbour(clip_model: Any) -> None:
    """In a batch, what lies beyond a prompt's own end is masked: the word does not stand beside that."""
    large = Pipeline(clip_model())
    trace = Trace(also=["cat", "a dog"], per_head=True)
    (alone,) = large(PROMPT, seed=[3], steps=1, trace=trace).heatmaps
    together = large([PROMPT, " ".join(["red"] * 90)], seed=[3, 4], steps=1, trace=trace).heatmaps[0]
    assert together.words.part("masked")
    for site, probs in alone.also.maps.items():
        assert torch.allclose(together.also.maps[site], probs, atol=1e-4), site.name


def test_words_beside_are_found_where_the_prompt_has_none(pipe: Pipeline) -> None:
    (heatmaps,) = paint(pipe, Trace(also=ALSO)).heatmaps
    assert torch.equal(heatmaps["dog"].raw, heatmaps.also["dog"].raw)
    assert torch.equal(heatmaps["a shadow"].raw, heatmaps.also["a shadow"].raw)
    assert not torch.equal(heatmaps["circle"].raw, heatmaps.also["circle"].raw)
    for part in ("bos", "EOS", "padding"):
        assert torch.equal(heatmaps[part].raw, heatmaps.part(part.lower()).raw)  # pyright: ignore[reportArgumentType]
    for key in ("cat", 7, ("dog", 1), 1.5, None):
        with pytest.raises(UsageError, match=r"is not in the prompt|no word number 7|a word is|occurs"):
            heatmaps[key]  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def test_the_negative_prompts_maps_are_those_of_a_pass_with_it(pipe: Pipeline) -> None:
    trace = Trace(sites="*", per_step=True, per_head=True, negative=True)
    (heatmaps,) = paint(pipe, trace, negative_prompt="a blue star").heatmaps
    steps = list(pipe.start(PROMPT, seed=3, steps=3, guidance=4.0, negative_prompt="a blue star"))
    text = pipe.encode_text("a blue star")
    _, maps = pipe.unet.trace(
        steps[1].latents, torch.tensor([steps[2].timestep]), text.embeddings, sites="*", reduce="none"
    )
    negative = heatmaps.negative
    assert [span.word for span in negative.words.spans] == ["a", "blue", "star"]
    for site, probs in maps.items():
        assert torch.allclose(negative.maps[site][2], probs[0], atol=1e-5), site.name
    assert sum(negative.shares().values()) == pytest.approx(1)
    assert torch.equal(negative.select(steps=[2])["star"].raw, heatmaps.select(steps=[2]).negative["star"].raw)


def test_negative_maps_are_of_the_steps_that_ask_for_them(pipe: Pipeline) -> None:
    guidance = guidance_interval(classifier_free_guidance(4.0), 0.5, 1.0)
    trace = Trace(negative=True, per_step=True)
    result = pipe(PROMPT, seed=3, steps=4, guidance=guidance, trace=trace, negative_prompt="star")
    (heatmaps,) = result.heatmaps
    assert heatmaps.steps == 4
    assert heatmaps.negative.steps == 2
    assert heatmaps.select(steps=[0]).negative_traced is None
    with pytest.raises(UsageError, match="was not traced"):
        _ = paint(pipe, Trace(negative=True), guidance=1.0).heatmaps[0].negative


def test_what_is_selected_left_out_or_sharpened_is_so_beside_too(pipe: Pipeline) -> None:
    trace = Trace(sites="up_blocks.*", per_head=True, per_step=True, also=["dog", "two dogs"], negative=True)
    (heatmaps,) = paint(pipe, trace, negative_prompt="a star").heatmaps
    part = heatmaps.select(sites="up_blocks.1.*", heads=[1], steps=[2])
    for name in ("also", "negative"):
        whole, chosen = getattr(heatmaps, name), getattr(part, name)
        assert {probs.shape[:2] for probs in chosen.maps.values()} == {(1, 1)}
        assert chosen.maps.keys() < whole.maps.keys()
        assert getattr(heatmaps.sharpened(), name).sharp
    left = heatmaps.without("bos")
    for site, probs in heatmaps.maps.items():
        if site.kind == "cross":  # the word beside the text without BOS: odds to what is left
            before = heatmaps.also.maps[site][..., list(heatmaps.also.words.tokens("two dogs"))].sum(dim=-1)
            after = left.also.maps[site][..., list(heatmaps.also.words.tokens("two dogs"))].sum(dim=-1)
            kept = 1 - probs[..., 0]
            assert torch.allclose(after / (1 - after), before / (1 - before) / kept, rtol=1e-3)
    assert left.negative.part("bos").raw.eq(0).all()


@pytest.mark.parametrize("also", ["dog", 3, [3], None, [None], {"dog": 1.0}.items(), [" "], ["dog", ""]], ids=str)
def test_words_that_are_none_are_refused(pipe: Pipeline, also: Any) -> None:
    with pytest.raises(UsageError, match=r"also is|also has an empty word"):
        Trace(also=also)
    with pytest.raises(UsageError, match=r"also is|also has an empty word"):
        pipe.look(Image.new("RGB", (64, 64)), "a circle", also=also)


def test_what_does_not_go_together_is_refused(pipe: Pipeline) -> None:
    for trace, said in (
        (Trace(also=["()"]), r"also has '\(\)', which is no word"),
        (Trace(sharp=True, sites="*"), "sharp maps choose sites and start themselves"),
        (Trace(sharp=True, start=0.5), "sharp maps choose sites and start themselves"),
    ):
        with pytest.raises(UsageError, match=said):
            paint(pipe, trace)
    with pytest.raises(UsageError, match="has no negative prompt"):
        pipe.look(Image.new("RGB", (64, 64)), "a circle", trace=Trace(negative=True))
    (heatmaps,) = paint(pipe, True).heatmaps
    with pytest.raises(UsageError, match="no words were looked for beside the prompt"):
        _ = heatmaps.also
    with pytest.raises(UsageError, match="negative=True"):
        _ = heatmaps.negative


def test_sharp_by_a_trace_is_sharp_by_its_name(pipe: Pipeline) -> None:
    by_name, by_trace = (paint(pipe, trace).heatmaps[0] for trace in ("sharp", Trace(sharp=True)))
    assert by_name.sharp
    assert by_trace.sharp
    assert same_maps(by_name, by_trace)


def test_images_are_looked_at_for_words_that_the_caption_does_not_have(pipe: Pipeline) -> None:
    images = [Image.effect_noise((64, 64), 60), Image.effect_noise((96, 64), 60)]
    plain = pipe.look(images, PROMPT)
    more = pipe.look(images, PROMPT, also=ALSO)
    for one, other in zip(plain, more, strict=True):
        assert same_maps(one, other)
        assert other.also.sharp
        assert len(other.also.words) == len(ALSO)
        assert other.also["dog"].raw.shape == one["circle"].raw.shape
    twice = pipe.look(images[0], PROMPT, trace=Trace(also=["dog"]), also=["dog", "cat", "dog"])[0]
    assert [span.word for span in twice.also.words.spans] == ["dog", "cat"]


def test_a_long_phrase_goes_over_several_chunks_or_is_cut_with_a_warning(pipe: Pipeline, clip_model: Any) -> None:
    long = " ".join(["dog"] * 90)
    large = Pipeline(clip_model())
    (heatmaps,) = large(PROMPT, steps=1, seed=0, trace=Trace(also=[long, "cat"])).heatmaps
    assert len(heatmaps.also.words.tokens(long)) == 90
    assert (heatmaps.also[long].raw <= 1).all()
    with pytest.warns(UserWarning, match="its end is left out"):
        paint(pipe, Trace(also=[long]))
