"""A pass with several texts an image against the same pass with every image repeated, and what of it runs once."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.conftest import fill_, relative_error
from torch import Tensor, nn

from gobelin.adapters.adapter_settings import AdapterConfig
from gobelin.adapters.trainable import adapter_parameters, add_adapters_
from gobelin.attention import AttentionEdit, AttentionSite
from gobelin.engines.eager import PreparedLayers, PreparedUNet
from gobelin.engines.fused_blocks import FusedBlocks
from gobelin.engines.packed_weights import PackedWeights
from gobelin.errors import UsageError
from gobelin.guidance import ConditionedUNet, Predictions
from gobelin.kernels.fused_layer import computes_fused_layers
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.shortcuts import DeepFeatures, Shortcuts
from gobelin.text_conditioning import TextConditioning
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

Inputs = dict[str, Tensor]
LEVELS = [(True, False), (False, True), (False, False), (True,), (False, False, True)]
"""Which levels hear words: the first, a later one, or the middle alone."""
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def make_unet(attention: Sequence[bool] = (True, False), seed: int = 0, **others: Any) -> UNet:
    config = UNetConfig.of(
        *(8, 12, 16)[: len(attention)], attention=tuple(attention), cross_attention_dim=6, attention_head_dim=2,
        norm_num_groups=4, **{"layers_per_block": 1, **others},
    )  # fmt: skip
    return fill_(UNet(config), seed).double()


def make_inputs(images: int = 3, texts: int = 2, size: tuple[int, int] = (5, 7), channels: int = 4) -> Inputs:
    generator = torch.Generator().manual_seed(images)
    mask = torch.rand(images * texts, 7, generator=generator) < 0.6
    mask[:, 0] = True
    return {
        "noisy_latents": torch.randn(images, channels, *size, generator=generator).double(),
        "timesteps": torch.rand(images, generator=generator) * 999,
        "text_embeddings": torch.randn(images * texts, 7, 6, generator=generator).double(),
        "text_mask": mask,
    }


def repeated(given: Inputs) -> Inputs:
    """The same pass with a row of its own for every text."""
    count = len(given["text_embeddings"]) // len(given["noisy_latents"])
    latents, timesteps = given["noisy_latents"], given["timesteps"]
    return {**given, "noisy_latents": latents.repeat(count, 1, 1, 1), "timesteps": timesteps.repeat(count)}


def rows_of(network: nn.Module) -> dict[str, int]:
    """Note how many rows each layer is given, in the order in which they run."""
    seen: dict[str, int] = {}
    for name, module in network.named_modules():
        if name and not any(module.children()):
            module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: len(given[0])}))
    return seen


@pytest.mark.parametrize("attention", LEVELS, ids=str)
@pytest.mark.parametrize(("images", "texts", "size"), [(1, 2, (5, 7)), (3, 2, (8, 6)), (2, 3, (1, 3))])
@torch.no_grad()
def test_it_predicts_and_attends_as_with_every_image_repeated(
    attention: tuple[bool, ...], images: int, texts: int, size: tuple[int, int]
) -> None:
    unet, given = make_unet(attention), make_inputs(images, texts, size)
    prediction, whole = unet(**given), repeated(given)
    assert relative_error(prediction, unet(**whole)) < 1e-13
    for rows in (None, slice(-images, None), slice(0, 1), slice(1, None, 2)):
        for reduce in ("heads", "none"):
            traced, maps = unet.trace(**given, sites="*", reduce=reduce, rows=rows)
            _, expected = unet.trace(**whole, sites="*", reduce=reduce, rows=rows)
            assert torch.equal(traced, prediction), "tracing changes no bit"
            assert list(maps) == list(expected)
            assert all(relative_error(maps[site], expected[site]) < 1e-6 for site in maps)
    given["text_mask"] = whole["text_mask"] = None
    assert relative_error(unet(**given), unet(**whole)) < 1e-13


@pytest.mark.parametrize("attention", LEVELS, ids=str)
@torch.no_grad()
def test_what_comes_before_the_first_word_runs_once_an_image(attention: tuple[bool, ...]) -> None:
    unet, given = make_unet(attention, layers_per_block=2), make_inputs()
    rows = rows_of(unet)
    unet(**given)
    order = list(rows)
    first = order.index(next(name for name in order if ".attn2." in name))
    before = [name for name in order[: first - 1] if "attn" not in name or ".attn1." in name]
    assert order[first - 1].endswith("norm2"), "which is the first layer that tells texts apart"
    assert {"conv_in", "time_embedding.linear_2", "down_blocks.0.resnets.0.conv2"} <= set(before)
    assert len([name for name in before if name.endswith("attn1.to_q")]) == 1
    for place, name in enumerate(order):
        alone = place < first - 1 or name.endswith("time_emb_proj")
        assert rows[name] == (3 if alone else 6), name


@pytest.mark.parametrize("sites", [FIRST, "*attn1", "*attn2", "*"])
@pytest.mark.parametrize("rows", [None, slice(-3, None), slice(2, 5)], ids=str)
@torch.no_grad()
def test_edits_concern_the_texts_that_they_would(sites: str, rows: slice | None) -> None:
    unet, given = make_unet(), make_inputs()
    seen: list[tuple[AttentionSite, int]] = []

    def watch(site: AttentionSite, probs: Tensor) -> Tensor:
        seen.append((site, len(probs)))
        return probs.clone()

    def mix(site: AttentionSite, probs: Tensor) -> Tensor:
        return (probs + probs.roll(1, -1) + probs.flip(0)) / 3  # which is another for every text

    watched, _ = unet.trace(**given, sites=(), rows=rows, edits=[AttentionEdit(change=watch, sites=sites)])
    assert torch.equal(watched, unet(**given)), "equal probabilities change no bit"
    assert {count for _, count in seen} == {len(range(6)[rows or slice(None)])}
    edits = [AttentionEdit(change=mix, sites=sites)]
    edited, maps = unet.trace(**given, sites="*", rows=rows, edits=edits)
    expected, their_maps = unet.trace(**repeated(given), sites="*", rows=rows, edits=edits)
    assert relative_error(edited, expected) < 1e-6  # probabilities are float32
    assert relative_error(edited, watched) > 1e-3
    assert all(relative_error(maps[site], their_maps[site]) < 1e-5 for site in maps)


@pytest.mark.parametrize("attention", [(True, True), (False, True)], ids=str)
@torch.no_grad()
def test_shortcuts_leave_out_the_same(attention: tuple[bool, ...]) -> None:
    unet, given = make_unet(attention), make_inputs(size=(6, 8))
    deep, theirs = DeepFeatures(), DeepFeatures()
    for merge in (0.0, 0.0, 0.5):
        now = {**given, "noisy_latents": given["noisy_latents"] + merge}
        ours, maps = unet.trace(**now, sites="*", rows=slice(1, 5), shortcuts=Shortcuts(merge_tokens=merge, deep=deep))
        expected, their_maps = unet.trace(
            **repeated(now), sites="*", rows=slice(1, 5), shortcuts=Shortcuts(merge_tokens=merge, deep=theirs)
        )
        assert relative_error(ours, expected) < 1e-13
        assert list(maps) == list(their_maps)
        assert all(relative_error(maps[site], their_maps[site]) < 1e-5 for site in maps)
    merged = Shortcuts(merge_tokens=0.5)
    ours, maps = unet.trace(**given, sites="*", rows=slice(1, 5), shortcuts=merged)
    expected, their_maps = unet.trace(**repeated(given), sites="*", rows=slice(1, 5), shortcuts=merged)
    assert relative_error(ours, expected) < 1e-13
    assert all(relative_error(maps[site], their_maps[site]) < 1e-5 for site in maps)


@torch.no_grad()
def test_adapters_go_along() -> None:
    unet, given = make_unet(), make_inputs()
    plain = unet(**given)
    add_adapters_(unet, AdapterConfig(rank=2, targets="all"))
    unet.double()
    for parameter in adapter_parameters(unet):
        parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.1)
    assert relative_error(unet(**given), unet(**repeated(given))) < 1e-13
    assert relative_error(unet(**given), plain) > 1e-3


def test_gradients_are_the_sum_over_the_texts_with_checkpointing_too() -> None:
    unet, found = make_unet().train(), []
    for given, recompute in ((make_inputs(), False), (make_inputs(), True), (repeated(make_inputs()), False)):
        unet.gradient_checkpointing = recompute
        latents = given["noisy_latents"].requires_grad_()
        prediction = unet(**given)
        wanted = (latents, *unet.parameters())
        gradients = torch.autograd.grad(prediction.square().sum(), wanted)
        found.append([gradients[0].unflatten(0, (-1, 3)).sum(dim=0), *gradients[1:]])
    for plain, recomputed, expected in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)
        torch.testing.assert_close(plain, expected)


@pytest.mark.parametrize(
    "prepare",
    [
        PackedWeights,
        pytest.param(
            FusedBlocks,
            marks=pytest.mark.skipif(
                not computes_fused_layers(torch.float32), reason="needs a C++ compiler and a CPU with AVX-512"
            ),
        ),
    ],
)
@pytest.mark.parametrize("attention", LEVELS, ids=str)
@torch.no_grad()
def test_prepared_layers_share_too(attention: tuple[bool, ...], prepare: Callable[[UNet], PreparedLayers]) -> None:
    unet = make_unet(attention).float().requires_grad_(False)
    given = {name: one.float() if one.is_floating_point() else one for name, one in make_inputs(size=(8, 6)).items()}
    runner = PreparedUNet(unet, prepare(unet)).updated()
    prediction, whole = runner(**given), repeated(given)
    assert relative_error(prediction, unet(**whole)) < 2e-5
    traced, maps = runner.trace(**given, sites="*", rows=slice(2, 5))
    assert torch.equal(traced, prediction)
    _, expected = unet.trace(**whole, sites="*", rows=slice(2, 5))
    assert all(relative_error(maps[site], expected[site]) < 2e-5 for site in expected)
    edits = [AttentionEdit(change=lambda site, probs: probs.roll(1, -1), sites="*")]
    edited, _ = runner.trace(**given, rows=slice(2, 5), edits=edits)
    assert relative_error(edited, unet.trace(**whole, rows=slice(2, 5), edits=edits)[0]) < 2e-5
    deep, theirs = DeepFeatures(), DeepFeatures()
    for merge in (0.0, 0.5):
        fast, _ = runner.trace(**given, shortcuts=Shortcuts(merge_tokens=merge, deep=deep))
        slow, _ = unet.trace(**whole, shortcuts=Shortcuts(merge_tokens=merge, deep=theirs))
        assert relative_error(fast, slow) < 2e-5


@torch.no_grad()
def test_guidance_gives_the_u_net_each_image_once_and_its_extra_channels() -> None:
    unet, given = make_unet(in_channels=9), make_inputs(channels=9)
    latents, extra = given["noisy_latents"].split((4, 5), dim=1)
    negative, positive = given["text_embeddings"].chunk(2)
    asked = Predictions(
        network=ConditionedUNet(
            unet=unet,
            schedule=NoiseSchedule(ScheduleConfig()),
            positive=TextConditioning(embeddings=positive),
            negative=TextConditioning(embeddings=negative),
            extra_channels=extra,
        ),
        noisy_latents=latents,
        timestep=400.5,
        alpha_cumprod=0.3,
    )
    rows = rows_of(unet)
    found = asked.both()
    assert (rows["conv_in"], rows["conv_out"]) == (3, 6)
    for prediction, text in zip(found, (negative, positive), strict=True):
        assert relative_error(prediction, unet(given["noisy_latents"], torch.full((3,), 400.5), text)) < 1e-13


@pytest.mark.parametrize(("images", "texts"), [(2, 3), (3, 2), (3, 1), (2, 0), (0, 2)])
@pytest.mark.parametrize("entry", ["forward", "trace"])
def test_rows_that_do_not_fit_are_refused(images: int, texts: int, entry: str) -> None:
    given = torch.zeros(images, 4, 4, 4).double(), torch.zeros(images), torch.zeros(texts, 5, 6).double()
    with pytest.raises(UsageError, match=f"is given {texts} texts for {images} images: give each image as many"):
        getattr(make_unet(), entry)(*given)
