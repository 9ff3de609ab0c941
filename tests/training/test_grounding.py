"""Grounding: whose masks and tokens belong together, what the loss asks for, and that a run learns it."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from gobelin import scenes
from gobelin.attention import AttentionSite
from gobelin.data import CachedDataset, SceneDataset
from gobelin.data.scene_groups import MAX_GROUPS, GroundingCache, ground
from gobelin.errors import UsageError
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer
from gobelin.training import find_preset
from gobelin.training.config import DataConfig
from gobelin.training.fine_tune_stages import InpaintingStage, WithPrior
from gobelin.training.grounding import grounding_loss, is_grounded
from gobelin.training.losses import UNetBatch, UNetLoss
from gobelin.training.presets import refuse_scenes_of_folder
from gobelin.training.stages import HalfSize, UNetStage
from gobelin.training.train_model import train
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

_FINE = AttentionSite(name="up_blocks.1.attentions.0.transformer_blocks.0.attn2", kind="cross", downscale=1, heads=2)
_COARSE = dataclasses.replace(_FINE, name="up_blocks.0.attentions.0.transformer_blocks.0.attn2", downscale=2)


@pytest.fixture(scope="module")
def core():
    return SceneDataset(world=scenes.CORE, count=200)


@pytest.fixture(scope="module")
def tokenizer(core):
    return Tokenizer.train([core.sample(index).caption for index in range(len(core))], vocab_size=700, max_length=32)


def spoken_of(tokenizer, sample, tokens):
    """The objects that each word is for, of those words of a caption that have any of these tokens."""
    spans = tokenizer.words(sample.caption).spans
    return {things for span, (_, things) in zip(spans, sample.words, strict=True) if tokens[list(span.tokens)].any()}


def test_each_group_has_the_words_for_it_alone_and_the_share_of_each_patch_that_it_covers(core, tokenizer):
    seen = set()
    for index in range(len(core)):
        sample = core.sample(index)
        masks, tokens = ground(sample, tokenizer, 16)
        groups = int(tokens.any(axis=1).sum())
        assert not tokens[groups:].any()
        assert not masks[groups:].any()
        assert not (tokens.sum(axis=0) > 1).any(), "a token speaks of one group"
        assert not tokens[:, 0].any(), "BOS speaks of nothing"
        for group in range(groups):
            (things,) = spoken_of(tokenizer, sample, tokens[group])
            expected = sample.masks[list(things)].any(axis=0).reshape(16, 4, 16, 4).mean(axis=(1, 3))
            np.testing.assert_allclose(masks[group], expected)
        if sample.category == "count":
            assert groups == 1
            assert masks[0].sum() * 16 == sample.masks.sum(), "all that are counted"
        if sample.category == "relation":
            assert groups == 2
        seen.add(sample.category)
    assert seen == {"single", "two", "relation", "count"}


def test_the_cache_gives_what_was_computed_and_computes_it_once(core, tokenizer, tmp_path, monkeypatch):
    cache = GroundingCache(core, tokenizer, 8, tmp_path)
    cache.fill(slice(0, 120))
    cache.fill(slice(120, None))
    masks, tokens = cache.read(torch.tensor([3, 150, 3]))
    assert masks.shape == (3, MAX_GROUPS, 8, 8)
    assert tokens.shape == (3, MAX_GROUPS, 32)
    for row, index in enumerate((3, 150, 3)):
        expected_masks, expected_tokens = ground(core.sample(index), tokenizer, 8)
        assert np.abs(masks[row].numpy() - expected_masks).max() <= 0.5 / 255 + 1e-6
        np.testing.assert_array_equal(tokens[row].numpy(), expected_tokens)
    monkeypatch.setattr(SceneDataset, "sample", lambda self, index: pytest.fail("drawn again"))
    GroundingCache(core, tokenizer, 8, tmp_path).fill()


def placed(which):
    """Two objects, left and right, of tokens 1 and 2; attention is where ``which`` says, by patch and token."""
    masks = torch.zeros(1, 3, 4, 4)
    masks[0, 0, :, :2], masks[0, 1, :, 2:] = 1, 1
    tokens = torch.zeros(1, 3, 5, dtype=torch.bool)
    tokens[0, 0, 1], tokens[0, 1, 2] = True, True
    columns = torch.arange(16) % 4
    probs = torch.full((1, 16, 5), 1e-4)
    probs[0, torch.arange(16), which(columns)] = 1
    return {_FINE: probs / probs.sum(dim=-1, keepdim=True)}, masks, tokens


def test_attention_in_place_costs_nothing_and_in_another_place_much():
    right, wrong, none = (
        grounding_loss(*placed(which)).item()
        for which in (
            lambda columns: torch.where(columns < 2, 1, 2),
            lambda columns: torch.where(columns < 2, 2, 1),
            lambda columns: torch.zeros_like(columns),
        )
    )
    assert right < 0.01
    assert wrong > 5
    assert none == pytest.approx(0.25 + np.log(2), abs=1e-3), "spread evenly: half is inside, and told by a coin"


def test_the_loss_is_that_of_loops_at_every_level_with_odd_sizes():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 3, 6, 10, generator=generator) * (torch.rand(2, 3, 1, 1, generator=generator) > 0.2)
    tokens = torch.zeros(2, 3, 7, dtype=torch.bool)
    tokens[0, 0, [1, 2]], tokens[0, 1, 4], tokens[1, 2, 5] = True, True, True
    maps = {
        _FINE: torch.rand(2, 60, 7, generator=generator).softmax(-1),
        _COARSE: torch.rand(2, 15, 7, generator=generator).softmax(-1),
    }
    expected = torch.zeros(2)
    for row in range(2):
        for site, probs in maps.items():
            height, width = site.grid(6, 10)
            pooled = masks[row].unfold(1, 6 // height, 6 // height).unfold(2, 10 // width, 10 // width).mean((3, 4))
            there = [group for group in range(3) if tokens[row, group].any() and pooled[group].sum() > 0]
            shares = {group: probs[row][:, tokens[row, group]].sum(dim=1) for group in there}
            outside = [
                (1 - (pooled[group].flatten() * shares[group]).sum() / shares[group].sum()) ** 2 for group in there
            ]
            all_words = sum(probs[row][:, tokens[row, group]].sum(dim=1) for group in range(3))
            confused = sum((pooled[group].flatten() * -(shares[group] / all_words).log()).sum() for group in there)
            covered = sum(pooled[group].sum() for group in there)
            if there:
                expected[row] += (sum(outside) / len(there) + confused / covered) / len(maps)
    torch.testing.assert_close(grounding_loss(maps, masks, tokens), expected)


def test_samples_without_words_or_masks_have_no_loss_and_finite_gradients():
    maps, masks, tokens = placed(lambda columns: torch.where(columns < 2, 2, 1))
    probs = next(iter(maps.values())).requires_grad_()
    for bare in ((masks, torch.zeros_like(tokens)), (torch.zeros_like(masks), tokens)):
        loss = grounding_loss({_FINE: probs}, *bare)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss.sum(), probs)
        assert torch.isfinite(gradient).all()


def grounded_batch(unet, count=2):
    generator = torch.Generator().manual_seed(1)
    _, masks, tokens = placed(lambda columns: columns)
    side = unet.config.sample_size
    masks = torch.nn.functional.interpolate(masks, size=(side, side)).repeat(count, 1, 1, 1)
    return UNetBatch(
        latents=torch.randn(count, 4, side, side, generator=generator),
        noise=torch.randn(count, 4, side, side, generator=generator),
        timesteps=torch.tensor([100, 500][:count]),
        texts=torch.randn(count, 5, 96, generator=generator),
        masks=masks,
        tokens=tokens.repeat(count, 1, 1),
    )


def test_the_loss_of_a_unet_is_denoising_and_grounding_and_learns_both():
    torch.manual_seed(0)
    unet = UNet(UNetConfig.nano())
    schedule = NoiseSchedule(ScheduleConfig())
    batch = grounded_batch(unet)
    plain, grounded = (UNetLoss(unet, None, schedule, grounding=weight) for weight in (0.0, 0.5))
    losses = grounded(batch)
    assert set(plain(batch)) == {"loss"}
    torch.testing.assert_close(losses["denoising"], plain(batch)["loss"])
    torch.testing.assert_close(losses["loss"], losses["denoising"] + 0.5 * losses["grounding"])
    sites = [site for site in unet.attention_sites if is_grounded(site)]
    assert sites
    assert all(site.kind == "cross" for site in sites)
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        grounded(batch)["loss"].backward()
        optimizer.step()
    after = grounded(batch)
    assert after["grounding"] < losses["grounding"] / 2
    assert after["denoising"] < losses["denoising"]


def test_dropped_captions_speak_of_nothing_and_masks_are_mirrored_with_the_image(core, tokenizer, tmp_path):
    few = dataclasses.replace(core, count=32)
    dataset = CachedDataset(few, tmp_path)
    cache = GroundingCache(few, tokenizer, 16, tmp_path)
    cache.fill()
    config = dataclasses.replace(find_preset("tiny").unet, caption_dropout=0.3, grounding=0.1)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch_size=32))
    moments = torch.zeros(32, 4, 16, 16)
    told = []

    def texts(captions):
        told.extend(captions)
        return torch.zeros(len(captions), 32, 96)

    module = UNetLoss(UNet(UNetConfig.nano()), None, NoiseSchedule(ScheduleConfig()), grounding=0.1)
    stage = UNetStage(
        *(module, dataset, lambda indices, mirrored: (moments, moments), 1.0, texts, config, 0),
        show=lambda module, step, run: None,
        flip=True,
        grounding=cache,
    )
    batch = stage.batch(0, slice(None))
    masks, tokens = cache.read(stage.order.indices(0))
    _, _, is_mirrored = stage.choices(stage.order.randoms(0, slice(None)))
    assert 0 < sum(caption == "" for caption in told) < 32
    for row, caption in enumerate(told):
        assert torch.equal(batch.tokens[row], tokens[row] if caption else torch.zeros_like(tokens[row]))
        assert torch.equal(batch.masks[row], masks[row].flip(-1) if is_mirrored[row] else masks[row])


def test_masks_are_halved_with_the_latents(core, tokenizer, tmp_path):
    few = dataclasses.replace(core, count=8)
    cache = GroundingCache(few, tokenizer, 16, tmp_path)
    cache.fill()
    config = dataclasses.replace(find_preset("tiny").unet, caption_dropout=0.0, grounding=0.1)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch_size=8))
    unet = UNet(UNetConfig.nano())

    def moments(side):
        return lambda indices, mirrored: (torch.zeros(8, 4, side, side),) * 2

    stage = UNetStage(
        UNetLoss(unet, None, NoiseSchedule(ScheduleConfig()), grounding=0.1),
        CachedDataset(few, tmp_path),
        *(moments(16), 1.0, lambda captions: torch.zeros(len(captions), 32, 96), config, 0),
        show=lambda module, step, run: None,
        grounding=cache,
        half_size=HalfSize(latents=moments(8), steps=1),
    )
    first, second = (stage.batch(step, slice(None)) for step in range(2))
    masks, _ = cache.read(stage.order.indices(0))
    assert first.masks.shape[2:] == first.latents.shape[2:] == (8, 8)
    torch.testing.assert_close(first.masks.mean(dim=(2, 3)), masks.mean(dim=(2, 3)))
    assert second.masks.shape[2:] == (16, 16)
    assert stage.module(first)["grounding"] > 0


@pytest.mark.parametrize("has_masks", [True, False])
def test_a_prior_beside_keeps_the_masks_of_both(has_masks):
    unet = UNet(UNetConfig.nano())
    own = grounded_batch(unet)
    prior = own if has_masks else dataclasses.replace(own, masks=None, tokens=None)
    both = WithPrior.__new__(WithPrior)
    both._stage, both._prior = (SimpleNamespace(batch=lambda step, rows, made=made: made) for made in (own, prior))
    both._weight = 0.5
    batch = both.batch(0, slice(None))
    expected = own.masks if has_masks else torch.zeros_like(own.masks)
    assert torch.equal(batch.masks, torch.cat([own.masks, expected]))
    assert torch.equal(batch.tokens[:2], own.tokens)
    assert batch.tokens[2:].any() == has_masks
    assert UNetLoss(unet, None, NoiseSchedule(ScheduleConfig()), grounding=0.5)(batch)["grounding"] > 0


def test_inpainting_keeps_the_masks_of_what_words_speak_of(monkeypatch):
    unet, vae = UNet(UNetConfig.nano()), VAE(VAEConfig.nano())
    made = grounded_batch(unet)
    stage = InpaintingStage.__new__(InpaintingStage)
    stage._vae = vae
    randoms = [np.random.default_rng(seed) for seed in range(2)]
    stage.order = SimpleNamespace(indices=lambda step: torch.arange(2), randoms=lambda step, rows: randoms)
    stage.dataset = SimpleNamespace(images=lambda indices: torch.zeros(2, 3, 64, 64))
    monkeypatch.setattr(UNetStage, "batch", lambda self, step, rows: made)
    monkeypatch.setattr(UNetStage, "choices", lambda self, drawn: (torch.zeros(2, dtype=torch.bool),))
    batch = stage.batch(0, slice(None))
    assert batch.masked is not None
    assert torch.equal(batch.masks, made.masks)
    assert torch.equal(batch.tokens, made.tokens)


def test_a_run_with_grounding_writes_both_losses(micro, tmp_path):
    config = micro()
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, grounding=0.2))
    folder = train(config, tmp_path / "run", console=Console(quiet=True))
    lines = [json.loads(line) for line in (folder / "training" / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if line["stage"] == "unet" and "grounding" in line]
    assert losses
    assert all(line["loss"] == pytest.approx(line["denoising"] + 0.2 * line["grounding"], rel=1e-3) for line in losses)


def test_a_folder_of_images_has_no_masks():
    config = find_preset("nano")
    config = dataclasses.replace(
        config, data=DataConfig(path="images"), unet=dataclasses.replace(config.unet, grounding=0.2)
    )
    with pytest.raises(UsageError, match=r"unet\.grounding is 0\.2 and would have no effect, as images of a folder"):
        refuse_scenes_of_folder(config)
