"""Shortcuts against passes whose features are replaced from outside, and in paintings: which passes are whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import fill_
from torch import Tensor

from gobelin.attention import AttentionEdit, Trace
from gobelin.control import LocalBlend, prompt_to_prompt
from gobelin.engines.eager import UnfoldedUNet
from gobelin.errors import UsageError
from gobelin.guidance import classifier_free_guidance, guidance_interval, perturbed_attention_guidance
from gobelin.pipeline import Pipeline
from gobelin.settings import Settings
from gobelin.shortcuts import DeepFeatures, ShortcutPlan, Shortcuts
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

PROMPT = "a red circle left of a blue square"
CACHED = Settings(seed=3, steps=7, guidance=2.0, cache_interval=3)


@pytest.fixture(params=[1, 2])
def unet(request: pytest.FixtureRequest) -> UNet:
    config = UNetConfig.of(
        *(8, 12),
        attention=(True, True),
        layers_per_block=request.param,
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return fill_(UNet(config))


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    return torch.randn(2, 4, 5, 6, generator=generator), torch.rand(2, generator=generator) * 999, text


@contextmanager
def watching(unet: UNet, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Change, and list, what enters the last but one residual block beside a skip connection's feature map."""
    block = unet.up_blocks[-1].resnets[-2]
    skip = unet.config.block_out_channels[0]
    seen: list[Tensor] = []

    def hook(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(given[0][:, :-skip])
        return (torch.cat([change(given[0][:, :-skip]), given[0][:, -skip:]], dim=1), *given[1:])

    handle = block.register_forward_pre_hook(hook)
    yield seen
    handle.remove()


@torch.no_grad()
def test_a_pass_over_kept_features_is_one_whose_features_are_replaced(unet: UNet) -> None:
    earlier, now = inputs(1), inputs(2)
    deep = DeepFeatures()
    whole, _ = unet.trace(*earlier, sites=(), shortcuts=Shortcuts(deep=deep))
    assert torch.equal(whole, unet(*earlier)), "the pass that keeps them is a plain one"
    with watching(unet, lambda hidden: hidden) as seen:
        unet(*earlier)
    assert deep.hidden is not None
    assert torch.equal(deep.hidden, seen[0])
    shallow, maps = unet.trace(*now, sites="*", shortcuts=Shortcuts(deep=deep))
    with watching(unet, lambda hidden: seen[0]):
        replaced = unet(*now)
    assert torch.equal(shallow, replaced)
    assert not torch.equal(shallow, unet(*now))
    layers = unet.config.layers_per_block + 1
    names = {site.name.split(".transformer_blocks")[0] for site in maps}
    last = [f"up_blocks.1.attentions.{number}" for number in (layers - 2, layers - 1)]
    assert names == {"down_blocks.0.attentions.0", *last}, "sites that did not run have no maps"
    again, _ = unet.trace(*now, sites=(), shortcuts=Shortcuts(deep=deep))
    assert torch.equal(shallow, again), "traced or not"


@torch.no_grad()
def test_over_features_of_the_same_latents_a_pass_is_exact(unet: UNet) -> None:
    given, deep = inputs(1), DeepFeatures()
    unet.trace(*given, sites=(), shortcuts=Shortcuts(deep=deep))
    assert torch.equal(unet.trace(*given, sites=(), shortcuts=Shortcuts(deep=deep))[0], unet(*given))
    run = UnfoldedUNet(unet)
    assert torch.equal(run.trace(*given, sites=(), shortcuts=Shortcuts(deep=deep))[0], unet(*given))


def test_edits_of_a_pass_with_shortcuts_are_refused(unet: UNet) -> None:
    edit = AttentionEdit(change=lambda site, probs: probs)
    with pytest.raises(UsageError, match="attention edits need a whole pass: leave out the shortcuts"):
        unet.trace(*inputs(1), edits=[edit], shortcuts=Shortcuts(merge_tokens=0.5))


def kinds(plan: ShortcutPlan, passes: list[tuple[int, float, bool]]) -> str:
    """Run a plan: w for whole passes that keep their features, s for shallow ones, e for exact ones."""
    said = ""
    for halves, timestep, is_controlled in passes:
        shortcuts = plan.next(halves, timestep, is_controlled)
        if shortcuts is None or shortcuts.deep is None:
            said += "e"
        elif shortcuts.deep.hidden is None:
            said += "w"
            shortcuts.deep.hidden = torch.zeros(1, 1, 1, 1)
        else:
            said += "s"
    return said


@pytest.mark.parametrize(
    ("interval", "passes", "expected"),
    [
        (3, [(2, t, False) for t in (8, 7, 6, 5, 4, 3, 2, 1)], "wsswssww"),
        (2, [(2, t, False) for t in (5, 4, 3, 2, 1)], "wswsw"),
        (9, [(2, t, False) for t in (4, 3, 2, 1)], "wssw"),
        (1, [(2, t, False) for t in (2, 1)], "ee"),
        (9, [(1, 5, False), (2, 4, False), (2, 3, False), (1, 2, False), (1, 1, False)], "wwsww"),
        (9, [(2, 5, True), (2, 4, True), (2, 3, False), (2, 2, False), (2, 1, False)], "eewsw"),
        (9, [(2, 5, False), (2, 4, True), (2, 3, False), (2, 2, False), (2, 1, False)], "wewsw"),
    ],
)
def test_a_plan_says_which_passes_are_whole(
    interval: int, passes: list[tuple[int, float, bool]], expected: str
) -> None:
    plan = ShortcutPlan(cache_interval=interval, merge_tokens=0.0, last_timestep=1)
    assert kinds(plan, [(halves, float(timestep), controlled) for halves, timestep, controlled in passes]) == expected


@pytest.fixture(scope="module")
def pipe(trained: Path) -> Pipeline:
    return Pipeline.from_pretrained(trained)


@pytest.fixture
def whole(pipe: Pipeline) -> Iterator[list[int]]:
    """The rows of each pass that went through the bottom of the U."""
    seen: list[int] = []
    handle = pipe.unet.mid_block.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    yield seen
    handle.remove()


def test_an_exact_image_is_what_it_was_and_says_nothing_of_shortcuts(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, seed=3, steps=4)
    same = pipe(PROMPT, seed=3, steps=4, cache_interval=1, merge_tokens=0.0)
    assert torch.equal(plain.latents, same.latents)
    assert plain.settings == same.settings
    assert not {"cache_interval", "merge_tokens"} & plain.settings[0].keys()


@pytest.mark.parametrize(("sampler", "passes"), [("ddim", 4), ("heun", 7), ("pndm", 4)])
def test_deep_layers_run_in_one_of_so_many_passes_and_in_the_last(
    pipe: Pipeline, whole: list[int], sampler: str, passes: int
) -> None:
    pipe(
        PROMPT, **{**dict(CACHED), "steps": 8, "sampler": sampler}
    )  # heun predicts 15 times, twice for the last step; pndm 9
    assert whole == [2] * passes


def test_an_approximate_image_is_repeated_from_its_settings_in_any_batch(pipe: Pipeline) -> None:
    made = pipe([PROMPT, "a ring"], **CACHED, merge_tokens=0.5)
    assert [made.settings[0][name] for name in ("cache_interval", "merge_tokens")] == [3, 0.5]
    settings = {name: value for name, value in made.settings[1].items() if name not in ("prompt", "model")}
    again = pipe("a ring", **settings)
    torch.testing.assert_close(again.latents, made.latents[1:], rtol=1e-4, atol=1e-4)
    exact = pipe("a ring", **{**settings, "cache_interval": 1, "merge_tokens": 0.0})
    assert (again.latents - exact.latents).abs().max() > 1e-3


@pytest.mark.parametrize("shortcuts", [{"cache_interval": 3}, {"merge_tokens": 0.5}])
def test_maps_are_means_over_the_steps_at_which_a_site_ran(pipe: Pipeline, shortcuts: dict[str, Any]) -> None:
    settings = {**dict(CACHED), "cache_interval": 1, **shortcuts}
    painting = pipe.start(PROMPT, **settings, trace=Trace(sites="*"))
    steps = [step.maps for step in painting]
    traced = painting.result
    assert torch.equal(traced.latents, pipe(PROMPT, **settings).latents), "traced or not"
    found = traced.heatmaps[0].maps
    assert tuple(found) == pipe.unet.attention_sites
    for site, maps in found.items():
        ran = [step[site][0] for step in steps if site in step]
        cached = "cache_interval" in shortcuts and not site.name.startswith(("down_blocks.0", "up_blocks.1"))
        assert len(ran) == (3 if cached else 7)
        torch.testing.assert_close(maps[0, 0], torch.stack(ran).mean(dim=0))
    sharp = pipe(PROMPT, **settings, trace="sharp").heatmaps[0]
    assert sharp["circle"].raw.shape == (64, 64)


def test_maps_of_every_step_are_refused_where_some_sites_rest(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="cache_interval is 3, and the maps of every step are asked for"):
        pipe(PROMPT, **CACHED, trace=Trace(per_step=True))
    pipe(PROMPT, **{**dict(CACHED), "cache_interval": 1}, merge_tokens=0.5, trace=Trace(per_step=True))


@pytest.mark.parametrize("control", ["edit", "blend"])
def test_passes_in_which_controls_act_are_exact(pipe: Pipeline, whole: list[int], control: str) -> None:
    prompts, seeds = [PROMPT, "a red circle left of a green square"], [3, 3]
    controls: list[Any] = [prompt_to_prompt(1.0, 1.0)] if control == "edit" else [LocalBlend()]
    settings = {**dict(CACHED), "seed": seeds, "control": controls}
    exact = pipe(prompts, **{**settings, "cache_interval": 1})
    whole.clear()
    cached = pipe(prompts, **settings, merge_tokens=0.5)
    assert len(whole) == 7
    assert torch.equal(cached.latents, exact.latents)


def test_after_controls_shortcuts_begin_with_a_whole_pass(pipe: Pipeline, whole: list[int]) -> None:
    edit = AttentionEdit(change=lambda site, probs: probs.flip(-1), end=0.4)
    levels = pipe.start(PROMPT, **CACHED).plan.levels
    held = sum(edit.holds(pipe.schedule.progress(timestep)) for timestep in levels.timesteps)
    pipe(PROMPT, **CACHED, control=edit)
    after = -(-(7 - held) // 3)
    assert 0 < held < 6
    assert len(whole) == held + after + ((7 - held - 1) % 3 != 0)


def test_a_guidance_interval_has_a_whole_pass_where_it_begins_and_where_it_ends(
    pipe: Pipeline, whole: list[int]
) -> None:
    guidance = guidance_interval(classifier_free_guidance(2.0), 0.3, 0.7)
    pipe(PROMPT, **{**dict(CACHED), "steps": 12, "cache_interval": 12, "guidance": guidance})
    assert whole == [1, 2, 1, 1], "the first, the first of both halves, the first of one again, and the last"


def test_passes_that_a_guidance_makes_beside_the_paintings_own_are_whole(pipe: Pipeline, whole: list[int]) -> None:
    guidance = perturbed_attention_guidance(classifier_free_guidance(2.0))
    pipe(PROMPT, **{**dict(CACHED), "guidance": guidance})
    assert whole.count(1) == 7
    assert whole.count(2) == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cache_interval", 0, "cache_interval is 0: give a whole number from 1 to 100"),
        ("cache_interval", 2.5, r"cache_interval is 2\.5: give a whole number from 1 to 100"),
        ("merge_tokens", 0.8, r"merge_tokens is 0\.8: give a number from 0 to 0\.75"),
        ("merge_tokens", -0.1, r"merge_tokens is -0\.1: give a number from 0 to 0\.75"),
    ],
)
def test_what_is_out_of_range_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**{name: value})
