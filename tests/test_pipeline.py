"""The pipeline: seeds, batches, steps, sizes, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gobelin
from gobelin.attention import AttentionEdit, Trace
from gobelin.checkpoint import loading
from gobelin.errors import ModelError, UsageError
from gobelin.look.sharp_maps import sharp_trace
from gobelin.pipeline import Pipeline, shipped_model
from gobelin.samplers import SAMPLERS


@pytest.fixture(scope="module")
def pipe(trained):
    return Pipeline.from_pretrained(trained)


def test_results_are_prompt_major_and_repeatable_from_their_settings(pipe):
    result = pipe(["a red circle", "a blue ring"], count=2, seed=3, guidance=2.0)
    assert [(s["prompt"], s["seed"]) for s in result.settings] == [
        ("a red circle", 3),
        ("a red circle", 4),
        ("a blue ring", 5),
        ("a blue ring", 6),
    ]
    assert result.latents.shape == (4, 4, 16, 16)
    settings = json.loads(json.dumps(result.settings[2]))
    del settings["model"]
    alone = pipe(settings.pop("prompt"), **settings)
    torch.testing.assert_close(alone.latents[0], result.latents[2], rtol=1e-4, atol=1e-4)


def test_another_seed_is_another_picture_and_none_is_drawn(pipe):
    first, second = (pipe("a red circle", seed=seed).latents for seed in (0, 1))
    assert (first - second).abs().max() > 0.1
    drawn = [pipe("a red circle", seed=None, steps=1).settings[0]["seed"] for _ in range(2)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_yields_its_steps(pipe, sampler):
    painting = pipe.start("a red circle", sampler=sampler, steps=2, seed=0)
    assert len(painting) == 2
    steps = list(painting)
    assert [step.index for step in steps] == [0, 1]
    assert steps[0].timestep > steps[1].timestep
    assert steps[0].sigma > steps[1].sigma
    assert steps[1].preview().size == (64, 64)
    final = pipe("a red circle", sampler=sampler, steps=2, seed=0)
    assert torch.equal(final.latents, steps[-1].latents)


@pytest.mark.parametrize(
    ("sampler", "guidance"),
    # one of each kind: one call a step, fresh noise, several steps' history, two calls a step, two at the first step
    [
        *((sampler, 3.0) for sampler in ("ddim", "euler_ancestral", "dpmpp_2m", "heun", "dpm_2_ancestral", "pndm")),
        ("euler", 1.0),
        ("heun", 1.0),
    ],
)
def test_tracing_changes_no_bit_and_yields_each_steps_maps(pipe, sampler, guidance):
    options = {"sampler": sampler, "steps": 3, "guidance": guidance, "count": 2, "height": 32, "width": 48, "seed": 0}
    plain = pipe(["a red circle", "a blue ring"], **options)
    traced = pipe(["a red circle", "a blue ring"], **options, trace=True)
    assert torch.equal(traced.latents, plain.latents)
    steps = list(pipe.start(["a red circle", "a blue ring"], **options, trace=True))
    for site in steps[0].maps:
        rows, columns = site.grid(8, 12)
        assert steps[0].maps[site].shape == (4, rows * columns, pipe.tokenizer.max_length), "the text's half alone"
        mean = torch.stack([step.maps[site][2] for step in steps]).mean(dim=0)
        torch.testing.assert_close(traced.heatmaps[2].maps[site][0, 0], mean)
    assert traced.heatmaps[2].words.text == "a blue ring"
    assert traced.heatmaps[2]["ring"].raw.shape == (32, 48)
    assert all(step.maps == {} for step in pipe.start("a red circle", steps=1))


def test_tracing_changes_no_bit_in_bfloat16(trained):
    pipe = Pipeline.from_pretrained(trained, dtype=torch.bfloat16)
    plain, traced = (pipe("a red circle", seed=0, steps=2, trace=trace) for trace in (False, True))
    assert torch.equal(traced.latents, plain.latents)
    assert traced.heatmaps[0].shares()["bos"] > 0


def test_heatmaps_agree_with_attention_computed_by_hand(pipe):
    result = pipe("a red circle", seed=2, steps=1, guidance=1.0, trace=Trace(sites="down*attn2", per_head=True))
    (site,) = {site for site in result.heatmaps[0].maps if site.downscale == 1}
    block = pipe.unet.get_submodule(site.name)
    seen = []
    hook = block.register_forward_hook(lambda _, inputs, __: seen.append(inputs[:2]))
    pipe("a red circle", seed=2, steps=1, guidance=1.0)
    hook.remove()
    hidden, words = seen[0]
    heads = site.heads
    query, key = block.to_q(hidden), block.to_k(words)
    width = query.shape[-1] // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        probs = torch.softmax(query[0, :, part] @ key[0, :, part].T / width**0.5, dim=-1)
        torch.testing.assert_close(result.heatmaps[0].maps[site][0, head], probs, rtol=1e-4, atol=1e-6)


def test_sharp_maps_are_of_the_second_half_of_the_way(pipe):
    prompts, options = ["a red circle", "a blue ring"], {"seed": 2, "steps": 4, "guidance": 3.0, "width": 48}
    sharp, plain = (pipe(prompts, **options, trace=trace) for trace in ("sharp", False))
    assert torch.equal(sharp.latents, plain.latents)
    sites = sharp_trace(pipe.unet.attention_sites, pipe.latent_size(None, 48)).sites
    assert {site.kind for site in sites} == {"self", "cross"}
    steps = list(pipe.start(prompts, **options, trace="sharp"))
    late = [step.maps for step in steps if pipe.schedule.progress(step.timestep) >= 0.5]
    assert [bool(step.maps) for step in steps] == [False, False, True, True]
    assert set(late[0]) == set(sites)
    for place, heatmaps in enumerate(sharp.heatmaps):
        means = {site: torch.stack([maps[site][place] for maps in late]).mean(dim=0)[None, None] for site in sites}
        found = replace(heatmaps, maps=means, sharp=False).sharpened()
        torch.testing.assert_close(heatmaps["a"].raw, found["a"].raw)
        assert not torch.allclose(heatmaps["a"].raw, replace(found, sharp=False)["a"].raw)


def test_the_last_step_is_traced_whatever_a_trace_starts_at(pipe):
    for steps in (1, 2):
        steps_traced = [bool(step.maps) for step in pipe.start("a red circle", steps=steps, trace=Trace(start=1.0))]
        assert steps_traced == [False, True][-steps:]
    assert pipe("a red circle", steps=1, trace="sharp").heatmaps[0]["red"].raw.shape == (64, 64)


def test_what_was_not_traced_cannot_be_looked_at(pipe):
    result = pipe("a red circle", steps=1)
    with pytest.raises(UsageError, match="painted without a trace: paint with trace=True"):
        _ = result.heatmaps
    with pytest.raises(UsageError, match=r"'attn3' matches no attention.*attn2"):
        pipe("a red circle", trace=Trace(sites="attn3"))
    with pytest.raises(UsageError, match="trace is 'shrap': give True, False, \"sharp\" or"):
        pipe("a red circle", trace="shrap")
    with pytest.raises(UsageError, match="start is 2: give a fraction from 0 to 1"):
        pipe("a red circle", trace=Trace(start=2))
    with pytest.raises(UsageError, match="matches no attention"):
        pipe("a red circle", control=AttentionEdit(change=lambda site, probs: probs, sites="attn3"))


def test_a_notebook_shows_pictures_and_words_that_light_up(pipe):
    plain, traced = (pipe('a "red" circle', count=2, steps=1, trace=trace) for trace in (False, True))
    assert plain._repr_html_().count('<img src="data:image/png;base64,') == 2
    assert 'alt="a &quot;red&quot; circle"' in plain._repr_html_()
    assert traced._repr_html_().count("<word-map>") == 2
    assert traced.heatmaps[0]._repr_html_() in traced._repr_html_()
    assert "tensor" not in repr(traced.heatmaps[0])


def test_each_picture_may_have_a_seed_of_its_own(pipe):
    own = pipe(["a red circle", "a blue ring"], seed=[7, 3], steps=2)
    assert [settings["seed"] for settings in own.settings] == [7, 3]
    torch.testing.assert_close(own.latents[1:], pipe("a blue ring", seed=3, steps=2).latents, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="3 seeds given for 2 images"):
        pipe(["a red circle", "a blue ring"], seed=[1, 2, 3])


def test_the_prompt_and_the_guidance_change_the_picture(pipe):
    base = pipe("a red circle", seed=0, guidance=2.0).latents
    for options in ({"guidance": 5.0}, {"negative_prompt": "blue"}, {"guidance_rescale": 0.9}, {"clip_skip": 1}):
        changed = pipe("a red circle", **{"seed": 0, "guidance": 2.0, **options}).latents
        assert not torch.equal(changed, base), options
    assert not torch.equal(pipe("a blue ring", seed=0, guidance=2.0).latents, base)


def test_any_size_that_the_vae_can_hold(pipe):
    result = pipe("a red circle", height=36, width=100, steps=1)
    assert result.images[0].size == (100, 36)


def test_start_latents_take_the_place_of_noise(pipe):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    given = pipe("a red circle", latents=latents, seed=99, sampler="ddim")
    drawn = pipe("a red circle", seed=0, sampler="ddim")
    assert torch.equal(given.latents, drawn.latents)
    with pytest.raises(UsageError, match=r"the start latents are \[1, 4, 16, 16\]: expected \[2, 4, 16, 16\]"):
        pipe("a red circle", count=2, latents=latents)


def test_it_saves_and_opens_again_in_half_precision(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, torch.float16)
    again = Pipeline.from_pretrained(tmp_path)
    assert again.unet.dtype == torch.float32
    assert again.recommended == pipe.recommended
    one, other = (np.asarray(p("a red circle", seed=0).images[0], int) for p in (pipe, again))
    assert np.abs(one - other).mean() < 2


def test_a_model_remembers_the_world_that_it_was_trained_on(pipe, tmp_path):
    assert pipe.model.world == "nano"
    pipe.save_pretrained(tmp_path)
    assert Pipeline.from_pretrained(tmp_path).model.world == "nano"
    file = tmp_path / "gobelin.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "world": None, "steps": 7}))
    again = Pipeline.from_pretrained(tmp_path)
    assert (again.model.world, again.recommended.steps) == (None, 7)
    file.write_text(json.dumps({**said, "world": 3}))
    with pytest.raises(ModelError, match="world is 3, expected the name of a world of scenes"):
        Pipeline.from_pretrained(tmp_path)
    file.unlink()
    assert Pipeline.from_pretrained(tmp_path).model.world is None


def test_it_runs_in_bfloat16(trained, pipe):
    fast = Pipeline.from_pretrained(trained, dtype=torch.bfloat16)
    result = fast("a red circle")
    assert result.latents.dtype == torch.float32
    assert result.latents.isfinite().all()


@pytest.mark.parametrize(("name", "prompt", "megabytes"), [("tiny", "a red circle", 17), ("emoji", "rocket, flat", 24)])
def test_a_shipped_model_is_small_and_opens(name, prompt, megabytes):
    size = sum(file.stat().st_size for file in shipped_model(name).rglob("*") if file.is_file())
    assert size <= megabytes * 1e6
    pipe = gobelin.Pipeline.from_pretrained(name)
    (image,) = pipe(prompt, seed=0).images
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 10, "something is painted"


def test_public_names_are_there():
    for name in gobelin.__all__:
        assert getattr(gobelin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Unet'"):
        gobelin.Unet  # noqa: B018


@pytest.fixture
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is a large one, on a CPU that multiplies bfloat16."""
    monkeypatch.setattr(loading, "_SMALL_MODEL", 0)
    monkeypatch.setattr(loading, "has_fast_bfloat16", lambda device: device.type == "cpu")


def test_the_shipped_model_is_opened_in_float32(trained: Path) -> None:
    for dtype in (None, "auto"):
        assert Pipeline.from_pretrained(trained, dtype=dtype).unet.dtype == torch.float32


@pytest.mark.usefixtures("_small_is_large")
def test_a_large_model_is_opened_in_bfloat16_where_that_is_fast(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Pipeline.from_pretrained(trained)
    pipe.save_single_file(tmp_path / "model.safetensors", dtype="float32")
    tokenizer = trained / "tokenizer"
    for made in (pipe, Pipeline.from_pretrained(tmp_path / "model.safetensors", dtype="auto", tokenizer=tokenizer)):
        assert {made.unet.dtype, made.vae.dtype, made.text_encoder.dtype} == {torch.bfloat16}
    assert Pipeline.from_pretrained(trained, dtype="float32").unet.dtype == torch.float32
    monkeypatch.setattr(loading, "has_fast_bfloat16", lambda device: False)
    assert Pipeline.from_pretrained(trained).unet.dtype == torch.float32


@pytest.mark.usefixtures("_small_is_large")
def test_weights_that_were_rounded_unasked_are_not_saved_in_silence(trained: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(trained)
    for save in (pipe.save_pretrained, pipe.to(dtype="float32").save_single_file):
        with pytest.raises(UsageError, match="open it with dtype='float32' to save them as they were"):
            save(tmp_path / "saved.safetensors")
    assert not list(tmp_path.iterdir())
    pipe.save_pretrained(tmp_path / "saved", dtype="bfloat16")
    Pipeline.from_pretrained(trained, dtype="bfloat16").save_pretrained(tmp_path / "asked")
