"""What each stage's loss computes."""

import dataclasses

import pytest
import torch
from PIL import Image
from torch import Generator

from gobelin import scenes
from gobelin.clip import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from gobelin.data import CachedDataset, CaptionIndex, SceneDataset
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer
from gobelin.training import find_preset
from gobelin.training.stages import (
    SketchHead,
    TextStage,
    TrainedModules,
    UNetStage,
    VAEStage,
    encode_images,
    encode_texts,
    image_grid,
)
from gobelin.unet import UNet, UNetConfig
from gobelin.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def dataset():
    return CachedDataset(SceneDataset(world=scenes.NANO, count=32))


def test_the_text_stage_adds_hard_negatives_and_learns(dataset):
    tokenizer = Tokenizer.train(dataset.captions, max_length=24)
    config = TextEncoderConfig.of(32, layers=1, heads=2, vocab_size=len(tokenizer.vocab), max_position_embeddings=24)
    text = TextEncoder(config).init_()
    image = ImageEncoder(ImageEncoderConfig(text_width=32, projection_dim=16, block_out_channels=(16, 16, 16)))
    config = find_preset("nano").text
    stage = TextStage(dataset, tokenizer, text, image, config)
    indices = torch.arange(8)
    seen = []
    image.similarity, similarity = lambda *both: seen.append(both[1].shape[0]) or similarity(*both), image.similarity
    first = stage.loss(indices, Generator().manual_seed(0))
    assert seen == [8 + sum(bool(dataset.negatives[index]) for index in range(8))]
    assert torch.equal(first["loss"], first["contrast"] + config.sketch * first["sketch"])
    optimizer = torch.optim.Adam(stage.module.parameters(), lr=1e-3)
    for _ in range(25):
        optimizer.zero_grad()
        loss = stage.loss(indices, Generator().manual_seed(0))["loss"]
        loss.backward()
        optimizer.step()
    assert loss < first["loss"] / 2


def test_a_sketch_is_drawn_from_the_words_and_nothing_after_them(dataset):
    """Two captions, two pictures: the error falls to nothing, and padding changes nothing."""
    torch.manual_seed(0)
    head = SketchHead(16, heads=2)
    words = torch.randn(2, 5, 16)
    mask = torch.tensor([[True, True, True, False, False], [True, True, True, True, False]])
    images = torch.cat([torch.full((1, 3, 64, 64), -1.0), torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)])
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(words, mask, images)
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    with torch.no_grad():
        drawn = head(words, mask)
        torch.testing.assert_close(drawn, head(words + 9.0 * ~mask[:, :, None], mask))
    assert drawn.shape == (2, 3, 8, 8)
    assert drawn[1, :, :, 0].mean() < -0.6, "dark on the left"
    assert drawn[1, :, :, 7].mean() > 0.6, "and light on the right"


def test_a_batch_of_equal_images_has_a_sketch_loss_too():
    head = SketchHead(16, heads=2)
    loss = head.loss(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool), torch.full((2, 3, 64, 64), 0.5))
    assert torch.isfinite(loss)
    assert loss > 1, "it is far off at first"


def test_the_vae_stage_starts_narrow_and_weighs_its_parts(dataset):
    config = find_preset("nano").vae
    stage = VAEStage(dataset, VAE(VAEConfig.nano()), config, torch.arange(4))
    losses = stage.loss(torch.arange(4), Generator().manual_seed(0))
    parts = sum(getattr(config, name) * losses[name] for name in ("mse", "coarse_mse", "edges", "l1", "kl"))
    torch.testing.assert_close(losses["loss"], parts)
    with torch.no_grad():
        posterior = stage.module.encode(dataset.images(torch.arange(4)))
    assert (posterior.logvar == -6).all()
    assert stage.sample_grid(stage.module, 0).size == (4 * 66 - 2, 2 * 66 - 2)


def test_the_decoder_learns_to_bear_noise_in_proportion_to_each_channel(dataset):
    def decoded(latent_noise):
        config = dataclasses.replace(find_preset("nano").vae, latent_noise=latent_noise)
        torch.manual_seed(0)
        stage = VAEStage(dataset, VAE(VAEConfig.nano()), config, torch.arange(4))
        seen = []
        stage.module.decode, decode = lambda latents: seen.append(latents) or decode(latents), stage.module.decode
        stage.loss(torch.arange(32), Generator().manual_seed(0))
        return seen[0].detach()

    clean, noisy = decoded(0.0), decoded(0.5)
    share = (noisy - clean).std(dim=(0, 2, 3)) / clean.std(dim=(0, 2, 3))
    torch.testing.assert_close(share, torch.full((4,), 0.5), rtol=0.05, atol=0)


def one_each(rows):
    """The index of images with one caption each."""
    return CaptionIndex(rows=rows, starts=torch.arange(len(rows)), counts=torch.ones_like(rows))


def unet_stage(dataset, **changes):
    config = dataclasses.replace(find_preset("nano").unet, **changes)
    latents = torch.randn(len(dataset), 4, 16, 16)
    texts = torch.arange(4.0)[:, None, None].expand(4, 6, 96).contiguous()  # the last is the empty caption's
    unet = UNet(UNetConfig.nano()).zero_init_()
    seen = {}

    def spy(noisy_latents, timesteps, text_embeddings):
        seen.update(noisy=noisy_latents, timesteps=timesteps, text=text_embeddings[:, 0, 0])
        return torch.zeros_like(noisy_latents)

    unet.forward = spy
    caption = torch.arange(len(dataset)) % 3
    schedule = NoiseSchedule(ScheduleConfig(prediction_type="epsilon"))
    stage = UNetStage(
        TrainedModules(unet, None),
        schedule,
        latents,
        torch.zeros_like(latents),
        texts,
        one_each(caption),
        config,
        sample=lambda modules, step: image_grid([Image.new("RGB", (4, 4))], 1),
    )
    return stage, seen, caption


def test_the_unet_stage_predicts_the_noise(dataset):
    stage, seen, caption = unet_stage(dataset, caption_dropout=0.0)
    indices = torch.randperm(32)
    loss = stage.loss(indices, Generator().manual_seed(0))["loss"]
    assert loss.item() == pytest.approx(1, abs=0.05), "a prediction of zero misses unit noise by 1"
    assert torch.equal(seen["text"], caption[indices].float())
    assert seen["timesteps"].min() >= 0
    assert seen["timesteps"].max() <= 999


def test_captions_are_dropped_as_often_as_asked(dataset):
    stage, seen, _ = unet_stage(dataset, caption_dropout=0.25)
    dropped = 0
    for step in range(40):
        stage.loss(torch.arange(32), Generator().manual_seed(step))
        dropped += (seen["text"] == 3).sum().item()
    assert 0.2 < dropped / (40 * 32) < 0.3


def test_the_loss_reaches_the_text_encoder_where_it_is_trained_too(dataset):
    tokenizer = Tokenizer.train(dataset.captions, max_length=24)
    captions, caption = dataset.unique_captions()
    text_encoder = TextEncoder(
        TextEncoderConfig.of(96, layers=1, heads=2, vocab_size=len(tokenizer.vocab), max_position_embeddings=24)
    ).init_()
    latents = torch.randn(len(dataset), 4, 16, 16)
    stage = UNetStage(
        TrainedModules(UNet(UNetConfig.nano()), text_encoder),
        NoiseSchedule(ScheduleConfig()),
        latents,
        torch.zeros_like(latents),
        tokenizer([*captions, ""]),
        caption,
        find_preset("nano").unet,
        sample=lambda modules, step: image_grid([Image.new("RGB", (4, 4))], 1),
    )
    stage.loss(torch.arange(8), Generator().manual_seed(0))["loss"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in text_encoder.parameters())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_are_even_or_shifted_towards_noise(dataset, shift):
    stage, seen, _ = unet_stage(dataset, timestep_shift=shift)
    timesteps = []
    for step in range(40):
        stage.loss(torch.arange(32), Generator().manual_seed(step))
        timesteps.append(seen["timesteps"])
    timesteps = torch.cat(timesteps)
    assert (timesteps < 1000 * shift / (1 + shift)).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert timesteps.min() < 100
    assert timesteps.max() > 980


def test_encoding_is_what_the_networks_say(dataset):
    vae = VAE(VAEConfig.nano())
    mean, std = encode_images(vae, dataset, torch.arange(32), batch_size=5)
    with torch.no_grad():
        posterior = vae.encode(dataset.images(torch.tensor([11])))
    torch.testing.assert_close(mean[11:12], posterior.mean)
    torch.testing.assert_close(std[11:12], posterior.logvar.mul(0.5).exp())
    tokenizer = Tokenizer.train(dataset.captions, max_length=24)
    text = TextEncoder(
        TextEncoderConfig.of(32, layers=1, heads=2, vocab_size=len(tokenizer.vocab), max_position_embeddings=24)
    )
    texts = ["a red circle", ""]
    assert encode_texts(text, tokenizer, texts).shape == (2, 24, 32)


def test_a_grid_shows_every_image():
    sheet = image_grid([Image.new("L", (4, 4), level) for level in (0, 32, 128, 223, 255)], columns=3)
    assert sheet.size == (16, 10)
    assert [sheet.getpixel((6 * (i % 3), 6 * (i // 3)))[0] for i in range(5)] == [0, 32, 128, 223, 255]
