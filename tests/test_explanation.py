"""Explanations of a query, against the traced maps and the network's own layers."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from PIL import Image

from gobelin.attention import Trace
from gobelin.control import suppress
from gobelin.control.ablations import ablate
from gobelin.errors import UsageError
from gobelin.explanation import explain_query, maps_at, token_names
from gobelin.pipeline import Pipeline
from gobelin.samplers import Step

SITE = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"
PROMPT, SETTINGS = "a red circle", {"seed": 3, "steps": 3, "guidance": 4.0}


@pytest.fixture(scope="module")
def pipe(clip_model) -> Pipeline:
    return Pipeline(clip_model())


@pytest.fixture(scope="module")
def steps(pipe: Pipeline) -> list[Step]:
    """The steps of a run with every map of cross-attention, and of one self-attention."""
    sites = [site for site in pipe.unet.attention_sites if site.kind == "cross" or site.name == SITE[:-1] + "1"]
    return list(pipe.start(PROMPT, trace=Trace(sites=sites, per_head=True, per_step=True), **SETTINGS))


def test_a_step_has_the_latents_that_the_network_saw(pipe: Pipeline, steps: list[Step]) -> None:
    for before, after in pairwise(steps):
        assert torch.equal(before.latents, after.noisy_latents)


@pytest.mark.parametrize("name", [SITE, "mid_block.attentions.0.transformer_blocks.0.attn2", SITE[:-1] + "1"])
@pytest.mark.parametrize(("step", "head", "pixel"), [(0, 0, (0, 0)), (2, 1, (63, 63)), (1, 0, (33, 5))])
def test_the_softmax_is_the_traced_map(
    pipe: Pipeline, steps: list[Step], name: str, step: int, head: int, pixel: tuple[int, int]
) -> None:
    traced = {site.name: probs for site, probs in steps[step].maps.items()}
    if name not in traced:
        pytest.skip("not traced")
    painting = pipe.start(PROMPT, **SETTINGS)
    explained = explain_query(painting, steps[step].noisy_latents, steps[step].timestep, name, head, pixel)
    place = explained.row * explained.grid[1] + explained.column
    torch.testing.assert_close(explained.softmax, traced[name][0, head, place], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(explained.probs, explained.softmax, atol=1e-6, rtol=1e-5)
    width = len(explained.query)
    torch.testing.assert_close(explained.keys @ explained.query / width**0.5, explained.scores)
    assert explained.shapes["query"] == [1, explained.site.heads, explained.grid[0] * explained.grid[1], width]
    assert len(explained.keys) == len(explained.values_norm) == explained.shapes["scores"][-1]


def test_queries_and_keys_are_projections_of_the_layer(pipe: Pipeline, steps: list[Step]) -> None:
    """Keys are the layer's ``to_k`` of the text, and the output its ``to_v``, weighed: computed without a probe."""
    painting = pipe.start(PROMPT, **SETTINGS)
    explained = explain_query(painting, steps[1].noisy_latents, steps[1].timestep, SITE, 1, (20, 40))
    layer = pipe.unet.get_submodule(SITE)
    embeddings = pipe.encode_text(PROMPT).embeddings
    heads = explained.site.heads
    with torch.no_grad():
        key, value = (
            projected(embeddings)[0].unflatten(-1, (heads, -1))[:, 1] for projected in (layer.to_k, layer.to_v)
        )
    torch.testing.assert_close(explained.keys, key)
    torch.testing.assert_close(explained.values_norm, value.norm(dim=-1))
    torch.testing.assert_close(explained.output, explained.probs @ value, atol=1e-5, rtol=1e-4)


def test_tokens_are_named_as_the_vocabulary_spells_them(pipe: Pipeline) -> None:
    names = token_names(pipe.start("an unheardofword", **SETTINGS))
    assert (names[0], names[1], names[-1], len(names)) == ("<bos>", "an", "<pad>", 77)
    end = names.index("<eos>")
    assert "".join(names[2:end]) == "unheardofword"


def test_a_longer_negative_prompt_adds_no_keys(pipe: Pipeline, steps: list[Step]) -> None:
    painting = pipe.start(PROMPT, negative_prompt="a very blue square " * 30, **SETTINGS)
    assert painting.plan.length > 77
    explained = explain_query(painting, steps[0].noisy_latents, steps[0].timestep, SITE, 0, (9, 9))
    assert len(explained.keys) == len(token_names(painting)) == 77
    assert explained.softmax.sum().item() == pytest.approx(1, abs=1e-5)


def test_controls_act_on_what_is_explained(pipe: Pipeline, steps: list[Step]) -> None:
    painting = pipe.start(PROMPT, control=suppress("red"), **SETTINGS)
    explained = explain_query(painting, steps[0].noisy_latents, steps[0].timestep, SITE, 0, (9, 9))
    (red,) = pipe.words(PROMPT).tokens("red")
    assert explained.softmax[red] > 0
    assert explained.probs[red] == 0


def test_maps_of_a_step_are_the_traced_ones(pipe: Pipeline, steps: list[Step]) -> None:
    result = pipe(PROMPT, trace=Trace(per_step=True, per_head=True), **SETTINGS)
    painting = pipe.start(PROMPT, **SETTINGS)
    latents = torch.cat([step.noisy_latents for step in steps])
    timesteps = [step.timestep for step in steps]
    for chosen, site, head in ((slice(1, 2), None, None), (slice(0, 3), SITE, None), (slice(2, 3), SITE, 1)):
        ours = maps_at(painting, latents[chosen], timesteps[chosen], result.images[0], site, head)
        steps_chosen = list(range(3))[chosen]
        theirs = result.heatmaps[0].select(sites=site, steps=steps_chosen, heads=None if head is None else [head])
        for word in range(3):
            torch.testing.assert_close(ours[word].raw, theirs[word].raw, atol=1e-5, rtol=1e-4)


def test_what_there_is_not_is_refused(pipe: Pipeline, steps: list[Step]) -> None:
    painting = pipe.start(PROMPT, **SETTINGS)
    latents, timestep = steps[0].noisy_latents, steps[0].timestep
    for site, head, pixel in (
        ("*", 0, (0, 0)),
        ("", 0, (0, 0)),
        (SITE, 99, (0, 0)),
        (SITE, -1, (0, 0)),
        (SITE, 0, (64, 0)),
        (SITE, 0, (0, -1)),
    ):
        with pytest.raises(UsageError):
            explain_query(painting, latents, timestep, site, head, pixel)
    with pytest.raises(UsageError, match="give a site of attn2"):
        maps_at(painting, latents, [timestep], Image.new("RGB", (64, 64)), SITE[:-1] + "1")


def test_ablations_change_what_they_say(pipe: Pipeline) -> None:
    words = pipe.words(PROMPT)
    text, (bos,) = list(words.part("text")), words.part("bos")
    plain = pipe(PROMPT, trace=Trace(per_head=True, per_step=True), **SETTINGS).heatmaps[0].maps
    first = {site.name: probs[0] for site, probs in plain.items()}
    down = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"  # the first, which other changes do not reach

    def broken(ablation: str, site: str | None = None) -> dict[str, torch.Tensor]:
        control = ablate(ablation, site)
        maps = pipe(PROMPT, trace=Trace(per_head=True, per_step=True), control=control, **SETTINGS).heatmaps[0].maps
        return {one.name: probs[0] for one, probs in maps.items()}

    shuffled = broken("shuffle_words")[down]
    torch.testing.assert_close(shuffled[..., text], first[down][..., text[-1:] + text[:-1]])
    torch.testing.assert_close(shuffled[..., bos], first[down][..., bos])
    removed = broken("remove_bos")[down]
    assert removed[..., bos].max() == 0
    torch.testing.assert_close(removed.sum(dim=-1), torch.ones(removed.shape[:-1]))
    silenced = broken("silence_site", SITE)
    assert silenced[SITE].max() == 0
    torch.testing.assert_close(silenced[down], first[down])
    for wrong in (("silence_site", None), ("shuffle_words", SITE), ("sing", None)):
        with pytest.raises(UsageError):
            ablate(*wrong)
    with pytest.raises(UsageError, match="matches no attention"):
        pipe.start(PROMPT, control=ablate("silence_site", "nowhere"))


def test_pointing_is_read_from_the_models_folder(pipe: Pipeline, tmp_path) -> None:
    assert pipe.model.pointing is None
    pointing = Pipeline.from_pretrained().model.pointing
    assert pointing is not None
    assert 0 < pointing["noun"]["iou"] < 1
    assert dataclasses.replace(pipe.model, pointing={"noun": {}}).pointing == {"noun": {}}
