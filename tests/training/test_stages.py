"""What each stage's loss computes."""

import dataclasses

import pytest
import torch
from PIL import Image
from rich.console import Console

from gobelin import scenes
from gobelin.clip import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from gobelin.data import CachedDataset, SceneDataset
from gobelin.data.encoded import LatentCache, TextCache, weights_hash
from gobelin.errors import DataError
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer
from gobelin.training import find_preset
from gobelin.training.losses import SketchHead, UNetLoss, min_snr_weights
from gobelin.training.run_folder import Run
from gobelin.training.stages import HalfSize, TextStage, UNetStage, VAEStage, encode_texts, image_grid
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return CachedDataset(SceneDataset(world=scenes.NANO, count=32), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run(tmp_path):
    return Run(
        folder=tmp_path,
        seed=0,
        device=torch.device("cpu"),
        save_every=9,
        sample_every=9,
        console=Console(quiet=True),
    )


def captions_of(dataset):
    return [dataset.captions(index)[0] for index in range(len(dataset))]


def sized(config, batch_size):
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch_size=batch_size))


def test_the_text_stage_adds_hard_negatives_and_learns(dataset):
    tokenizer = Tokenizer.train(captions_of(dataset), max_length=24)
    config = TextEncoderConfig.of(32, layers=1, heads=2, vocab_size=len(tokenizer.vocab), max_position_embeddings=24)
    text = TextEncoder(config).init_()
    image = ImageEncoder(ImageEncoderConfig(text_width=32, projection_dim=16, block_out_channels=(16, 16, 16)))
    config = sized(find_preset("nano").text, 8)
    stage = TextStage(dataset, tokenizer, text, image, config, seed=0)
    batch = stage.batch(0, slice(None))
    indices = stage.order.indices(0).tolist()
    assert len(batch.token_ids) == 8 + sum(bool(dataset.negatives(index)) for index in indices)
    assert torch.equal(batch.token_ids[:8], tokenizer([dataset.captions(index)[0] for index in indices]))
    first = stage.module(batch)
    assert torch.equal(first["loss"], first["contrast"] + config.sketch * first["sketch"])
    optimizer = torch.optim.Adam(stage.module.parameters(), lr=1e-3)
    for _ in range(25):
        optimizer.zero_grad()
        loss = stage.module(batch)["loss"]
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


def vae_stage(dataset, batch_size=4, **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(sized(find_preset("nano").vae, batch_size), **changes)
    return VAEStage(dataset, VAE(VAEConfig.nano()), config, 0, 4)


def test_the_vae_stage_starts_narrow_and_weighs_its_parts(dataset, run):
    stage = vae_stage(dataset)
    config = stage.module.config
    losses = stage.module(stage.batch(0, slice(None)))
    parts = sum(getattr(config, name) * losses[name] for name in ("mse", "coarse_mse", "edges", "l1", "kl"))
    torch.testing.assert_close(losses["loss"], parts)
    with torch.no_grad():
        posterior = stage.module.vae.encode(dataset.images(range(4)))
    assert (posterior.logvar == -6).all()
    assert stage.evaluate(stage.module, 0, run).size == (4 * 66 - 2, 2 * 66 - 2)


def test_the_decoder_learns_to_bear_noise_in_proportion_to_each_channel(dataset):
    def decoded(latent_noise):
        stage = vae_stage(dataset, 32, latent_noise=latent_noise)
        vae, seen = stage.module.vae, []
        vae.decode, decode = lambda latents: seen.append(latents) or decode(latents), vae.decode
        stage.module(stage.batch(0, slice(None)))
        return seen[0].detach()

    clean, noisy = decoded(0.0), decoded(0.5)
    share = (noisy - clean).std(dim=(0, 2, 3)) / clean.std(dim=(0, 2, 3))
    torch.testing.assert_close(share, torch.full((4,), 0.5), rtol=0.05, atol=0)


class Latents:
    """Random latents in a cache's place, those of mirror images negated."""

    def __init__(self, count, std=0.0):
        self.means = torch.randn(count, 4, 16, 16)
        self.std = std

    def read(self, indices, mirrored):
        means = self.means[indices] * torch.where(mirrored, -1.0, 1.0)[:, None, None, None]
        return means, torch.full_like(means, self.std)


def unet_stage(dataset, prediction="epsilon", flip=False, std=0.0, gamma=None, **changes):
    config = dataclasses.replace(sized(find_preset("nano").unet, 32), **changes)
    known = [*captions_of(dataset), ""]
    unet = UNet(UNetConfig.nano()).zero_init_()
    seen = {}

    def spy(noisy_latents, timesteps, text_embeddings):
        seen.update(noisy=noisy_latents, timesteps=timesteps, text=text_embeddings[:, 0, 0])
        return torch.zeros_like(noisy_latents)

    unet.forward = spy
    module = UNetLoss(unet, None, NoiseSchedule(ScheduleConfig(prediction_type=prediction)), gamma)
    stage = UNetStage(
        module,
        dataset,
        Latents(len(dataset), std).read,
        1.0,
        lambda texts: torch.tensor([float(known.index(text)) for text in texts])[:, None, None].expand(-1, 6, 96),
        config,
        0,
        lambda module, step, run: None,
        flip,
    )
    return stage, seen, known


def test_the_unet_stage_predicts_the_noise(dataset):
    stage, seen, known = unet_stage(dataset, caption_dropout=0.0)
    loss = stage.module(stage.batch(0, slice(None)))["loss"]
    assert loss.item() == pytest.approx(1, abs=0.05), "a prediction of zero misses unit noise by 1"
    captions = [dataset.captions(index)[0] for index in stage.order.indices(0).tolist()]
    assert [known[int(text)] for text in seen["text"]] == captions
    assert seen["timesteps"].min() >= 0
    assert seen["timesteps"].max() <= 999


def test_the_first_steps_are_at_half_size(dataset):
    stage, seen, _ = unet_stage(dataset)
    full = [stage.batch(step, slice(None)) for step in range(3)]
    halves = torch.randn(len(dataset), 4, 8, 8)
    stage._half_size = HalfSize(latents=lambda indices, mirrored: (halves[indices], torch.zeros(1)), steps=2)
    made = [stage.batch(step, slice(None)) for step in range(3)]
    for step in (0, 1):
        assert torch.equal(made[step].latents, halves[stage.order.indices(step)])
        assert made[step].noise.shape == made[step].latents.shape
        assert torch.equal(made[step].timesteps, full[step].timesteps)
        assert torch.equal(made[step].texts, full[step].texts)
    assert torch.equal(made[2].latents, full[2].latents)
    assert torch.equal(made[2].noise, full[2].noise)
    assert stage.module(made[0])["loss"].item() == pytest.approx(1, abs=0.1)
    assert seen["noisy"].shape[2:] == (8, 8)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_of_a_batch_are_the_batch(dataset, parts):
    stage, _, _ = unet_stage(dataset, flip=True, std=0.3, offset_noise=0.1)
    whole = stage.batch(5, slice(None))
    for part in range(parts):
        rows = slice(part, None, parts)
        made = stage.batch(5, rows)
        for name in ("latents", "noise", "timesteps", "texts"):
            assert torch.equal(getattr(made, name), getattr(whole, name)[rows]), name


def test_captions_are_dropped_as_often_as_asked(dataset):
    stage, _, known = unet_stage(dataset, caption_dropout=0.25)
    texts = torch.cat([stage.batch(step, slice(None)).texts[:, 0, 0] for step in range(40)])
    assert 0.2 < (texts == known.index("")).float().mean() < 0.3


def test_half_of_the_images_are_mirrored_if_that_is_asked_for(dataset):
    def mirrored(flip):
        stage, _, _ = unet_stage(dataset, flip=flip)
        own = stage._latents.__self__.means[stage.order.indices(0)]
        return (stage.batch(0, slice(None)).latents - own).abs().amax(dim=(1, 2, 3)) > 0

    assert not mirrored(False).any()
    assert 0.2 < mirrored(True).float().mean() < 0.8


def test_every_caption_of_an_image_is_picked_as_often(dataset, monkeypatch):
    stage, _, known = unet_stage(dataset, caption_dropout=0.0)
    monkeypatch.setattr(dataset, "captions", lambda index: tuple(known[:3]))
    texts = torch.cat([stage.batch(step, slice(None)).texts[:, 0, 0] for step in range(60)]).int()
    counts = torch.bincount(texts, minlength=3) / len(texts)
    torch.testing.assert_close(counts[:3], torch.full((3,), 1 / 3), rtol=0, atol=0.04)


def test_offset_noise_shifts_whole_channels(dataset):
    def spread(offset_noise):
        stage, _, _ = unet_stage(dataset, offset_noise=offset_noise)
        noise = torch.cat([stage.batch(step, slice(None)).noise for step in range(10)])
        return noise.mean(dim=(2, 3)).std().item()

    assert spread(0.0) == pytest.approx(1 / 16, rel=0.1), "of the mean of 256 normal numbers"
    assert spread(0.5) == pytest.approx((1 / 256 + 0.25) ** 0.5, rel=0.1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_of_denoised_latents_alike_up_to_gamma(prediction):
    """The error of ẑ_0 that a prediction's error makes, times min(SNR, γ), whatever is predicted."""
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))
    timesteps = torch.tensor([1, 100, 400, 700, 998])
    weights = min_snr_weights(schedule, timesteps, gamma=5.0)
    for timestep, weight in zip(timesteps.tolist(), weights.tolist(), strict=True):
        alpha = schedule.alphas_cumprod[timestep].item()
        slope = schedule.denoised_slope(alpha)
        assert weight == pytest.approx(min(alpha / (1 - alpha), 5.0) * slope**2, rel=1e-4)


def test_min_snr_is_finite_without_signal():
    schedule = NoiseSchedule(ScheduleConfig.zero_terminal_snr())
    assert min_snr_weights(schedule, torch.tensor([999]), 5.0).item() == 0


def test_the_loss_reaches_the_text_encoder_where_it_is_trained_too(dataset):
    tokenizer = Tokenizer.train(captions_of(dataset), max_length=24)
    text_encoder = TextEncoder(
        TextEncoderConfig.of(96, layers=1, heads=2, vocab_size=len(tokenizer.vocab), max_position_embeddings=24)
    ).init_()
    stage = UNetStage(
        UNetLoss(UNet(UNetConfig.nano()), text_encoder, NoiseSchedule(ScheduleConfig())),
        dataset,
        Latents(len(dataset)).read,
        1.0,
        tokenizer,
        sized(find_preset("nano").unet, 8),
        0,
        lambda module, step, run: None,
    )
    stage.module(stage.batch(0, slice(None)))["loss"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in text_encoder.parameters())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_are_even_or_shifted_towards_noise(dataset, shift):
    stage, _, _ = unet_stage(dataset, timestep_shift=shift)
    timesteps = torch.cat([stage.batch(step, slice(None)).timesteps for step in range(40)])
    assert (timesteps < 1000 * shift / (1 + shift)).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert timesteps.min() < 100
    assert timesteps.max() > 980


def test_cached_latents_and_texts_are_what_the_networks_say(dataset, tmp_path):
    vae = VAE(VAEConfig.nano())
    latents = LatentCache(dataset, tmp_path, weights_hash(vae), flip=True)
    with torch.no_grad():
        latents.fill(vae.encode)
        image = dataset.images([11])
        own, mirrored = vae.encode(image), vae.encode(image.flip(-1))
    for posterior, flip in ((own, False), (mirrored, True)):
        mean, std = latents.read(torch.tensor([11]), torch.tensor([flip]))
        torch.testing.assert_close(mean, posterior.mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(std, posterior.logvar.mul(0.5).exp(), rtol=1e-3, atol=1e-3)
    tokenizer = Tokenizer.train(captions_of(dataset), max_length=24)
    text = TextEncoder(
        TextEncoderConfig.of(32, layers=1, heads=2, vocab_size=len(tokenizer.vocab), max_position_embeddings=24)
    )
    cache = TextCache(tmp_path, weights_hash(text))
    cache.fill(dataset, lambda texts: encode_texts(text, tokenizer, texts))
    texts = ["", dataset.captions(5)[0]]
    torch.testing.assert_close(cache.read(texts), encode_texts(text, tokenizer, texts), rtol=1e-3, atol=2e-3)
    with pytest.raises(DataError, match="lacks 1 of 1 rows"):
        cache.read(["of no image"])


def test_another_vae_or_another_crop_is_encoded_anew(dataset, tmp_path):
    """A stale key recomputes: nothing that was made otherwise is taken for these latents."""
    vae = VAE(VAEConfig.nano())
    with torch.no_grad():
        LatentCache(dataset, tmp_path, weights_hash(vae)).fill(vae.encode)
        vae.quant_conv.bias.add_(1)
        changed = LatentCache(dataset, tmp_path, weights_hash(vae))
        with pytest.raises(DataError, match="lacks"):
            changed.read(torch.tensor([0]))
        changed.fill(vae.encode)
        mean = vae.encode(dataset.images([0])).mean
    torch.testing.assert_close(changed.read(torch.tensor([0]))[0], mean, rtol=1e-3, atol=1e-3)


def test_a_network_that_gives_no_numbers_is_not_cached(dataset, tmp_path):
    vae = VAE(VAEConfig.nano())
    with torch.no_grad():
        vae.quant_conv.bias.fill_(float("nan"))
        with pytest.raises(DataError, match="are not finite"):
            LatentCache(dataset, tmp_path, weights_hash(vae)).fill(vae.encode)


def test_a_grid_shows_every_image():
    sheet = image_grid([Image.new("L", (4, 4), level) for level in (0, 32, 128, 223, 255)], columns=3)
    assert sheet.size == (16, 10)
    assert [sheet.getpixel((6 * (i % 3), 6 * (i // 3)))[0] for i in range(5)] == [0, 32, 128, 223, 255]
