"""The VAE against diffusers' AutoencoderKL and its DiagonalGaussianDistribution."""

import random
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from tests.conftest import edit_config, fill_, norm_eps, relative_error

from gobelin.errors import ModelError, UsageError
from gobelin.formats.weights import parameter_count
from gobelin.vae import VAE, Posterior, VAEConfig

SMALL = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=16)


def random_config(seed: int) -> VAEConfig:
    draw = random.Random(seed)
    groups = draw.choice((1, 2, 4))
    return VAEConfig(
        block_out_channels=tuple(groups * draw.randint(1, 4) for _ in range(draw.randint(1, 3))),
        layers_per_block=draw.randint(1, 2),
        latent_channels=draw.randint(1, 6),
        norm_num_groups=groups,
        mid_block_add_attention=seed % 3 > 0,
    )


def twin(vae: VAE) -> AutoencoderKL:
    """diffusers' model of the same configuration, on the very same weights."""
    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(vae.config_json())
    weights = vae.state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(weights, assign=True)
    return theirs.eval()


@torch.no_grad()
def assert_equal(ours: VAE, theirs: AutoencoderKL) -> None:
    factor = ours.config.factor
    images = torch.rand(2, 3, 5 * factor, 3 * factor) * 2 - 1
    posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
    assert relative_error(posterior.mean, expected.mean) < 2e-5
    assert relative_error(posterior.logvar, expected.logvar) < 2e-5
    latents = torch.randn(2, ours.config.latent_channels, 5, 3)
    assert relative_error(ours.decode(latents), theirs.decode(latents).sample) < 2e-5


@pytest.mark.parametrize("seed", range(12))
def test_any_shape_encodes_and_decodes_as_diffusers_does(seed: int) -> None:
    ours = fill_(VAE(random_config(seed)), seed)
    theirs = twin(ours)
    assert norm_eps(ours) == norm_eps(theirs)
    assert_equal(ours, theirs)


def test_sd15_has_its_parameters_under_its_keys() -> None:
    with torch.device("meta"):
        ours, theirs = VAE(VAEConfig.sd15()), AutoencoderKL.from_config(VAE(VAEConfig.sd15()).config_json())
    assert parameter_count(ours) == 83_653_863
    assert len(ours.state_dict()) == 248
    assert VAEConfig.sd15().factor == 8
    shapes, expected = ({name: t.shape for name, t in vae.state_dict().items()} for vae in (ours, theirs))
    assert shapes == expected


def test_a_saved_folder_opens_in_diffusers_and_one_of_diffusers_opens_here(tmp_path: Path) -> None:
    ours = fill_(VAE(SMALL))
    ours.save_pretrained(tmp_path / "ours")
    theirs = AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert theirs.config.scaling_factor == SMALL.scaling_factor
    assert_equal(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = VAE.from_pretrained(tmp_path / "theirs")
    assert again.config == SMALL
    assert_equal(again, theirs)


@pytest.mark.parametrize("name", list(VAEConfig.fixed))
def test_a_config_file_of_another_architecture_is_refused_by_the_field(name: str, tmp_path: Path) -> None:
    VAE(SMALL).save_pretrained(tmp_path)
    edit_config(tmp_path, **{name: not VAEConfig.fixed[name]})
    with pytest.raises(ModelError, match=rf"config\.json: {name} is "):
        VAE.from_pretrained(tmp_path)


def test_older_files_name_the_attention_otherwise(tmp_path: Path) -> None:
    vae = fill_(VAE(VAEConfig(block_out_channels=(8, 8), norm_num_groups=4)))
    vae.save_pretrained(tmp_path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(tmp_path / VAE.weights_name)
    for new, old in older.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, tmp_path / VAE.weights_name)
    again = VAE.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in vae.state_dict().items())


def test_a_vae_without_levels_is_refused() -> None:
    with pytest.raises(UsageError, match="block_out_channels is empty"):
        VAEConfig(block_out_channels=())


def test_widths_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="the width 10 must divide into 4 groups"):
        VAEConfig(block_out_channels=(8, 10), norm_num_groups=4)


@pytest.mark.parametrize(("height", "width"), [(9, 8), (8, 9), (7, 7)])
def test_images_that_do_not_divide_into_latents_are_refused(height: int, width: int) -> None:
    with pytest.raises(UsageError, match=f"{width}×{height} pixels: the sides must be multiples of 2"):
        VAE(SMALL).encode(torch.zeros(1, 3, height, width))


def test_the_log_variance_is_held_between_minus_30_and_20() -> None:
    ours = fill_(VAE(SMALL))
    with torch.no_grad():
        ours.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, 0.0, 0.0])
    logvar = ours.encode(torch.rand(1, 3, 8, 8)).logvar
    assert (logvar[:, 0] == -30).all()
    assert (logvar[:, 1] == 20).all()
    assert_equal(ours, twin(ours))


def test_the_posterior_is_diffusers_distribution() -> None:
    mean, logvar = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 2)
    ours, theirs = Posterior(mean=mean, logvar=logvar), DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1))
    assert torch.equal(ours.mode(), theirs.mode())
    drawn = ours.sample(torch.Generator().manual_seed(7))
    assert relative_error(drawn, theirs.sample(torch.Generator().manual_seed(7))) < 1e-6
    assert ours.kl().shape == (4,)
    assert relative_error(ours.kl().sum(), theirs.kl().mean()) < 1e-6


def test_kl_is_kept_apart_for_each_channel() -> None:
    mean = torch.zeros(2, 3, 4, 4)
    mean[:, 1] = 2.0
    torch.testing.assert_close(Posterior(mean=mean, logvar=torch.zeros_like(mean)).kl(), torch.tensor([0.0, 32.0, 0.0]))


def test_images_become_latents_scaled_and_come_back() -> None:
    vae = fill_(VAE(SMALL))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    posterior = vae.encode(images)
    torch.testing.assert_close(vae.images_to_latents(images), 0.18215 * posterior.mean)
    drawn = vae.images_to_latents(images, torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, 0.18215 * posterior.sample(torch.Generator().manual_seed(3)))
    assert not torch.equal(drawn, vae.images_to_latents(images))
    torch.testing.assert_close(vae.latents_to_images(0.18215 * posterior.mean), vae.decode(posterior.mean))


@torch.no_grad()
def test_normalising_latents_gives_unit_variance_and_the_same_pictures() -> None:
    vae = fill_(VAE(SMALL))
    images = torch.rand(16, 3, 16, 16) * 2 - 1
    before = vae.encode(images)
    pictures = vae.decode(before.mean)
    mean, std = before.mean.mean(dim=(0, 2, 3)), before.mean.std(dim=(0, 2, 3))
    vae.normalise_latents_(mean, std)
    after = vae.encode(images)

    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(after.mean.var(dim=(0, 2, 3)), torch.ones(4), rtol=1e-4, atol=0)
    spread = (after.logvar / 2).exp() * std[:, None, None]
    assert relative_error(spread, (before.logvar / 2).exp()) < 1e-4
    assert relative_error(vae.decode(after.mean), pictures) < 1e-4
    assert_equal(vae, twin(vae))


@pytest.mark.parametrize("size", [(40, 24), (33, 50)])
def test_tiles_have_no_seams(size: tuple[int, int]) -> None:
    vae = fill_(VAE(VAEConfig.nano()))
    latents = torch.randn(2, 4, *size)
    with torch.no_grad():
        whole, tiled = vae.latents_to_images(latents), vae.latents_to_large_images(latents, tile=24, overlap=8)
        assert relative_error(vae.latents_to_large_images(latents, tile=64), whole) < 1e-5, "one tile is the whole"
    assert tiled.shape == whole.shape
    # What differs comes in slowly: no step between neighbouring pixels is larger than in the whole.
    apart = tiled - whole
    steps = torch.cat([apart.diff(dim=-1).abs().flatten(), apart.diff(dim=-2).abs().flatten()])
    within = torch.cat([whole.diff(dim=-1).abs().flatten(), whole.diff(dim=-2).abs().flatten()])
    assert steps.max() < 0.25 * within.max()
    with pytest.raises(UsageError, match="overlap by 40: give an overlap from 1 to half"):
        vae.latents_to_large_images(latents, tile=64, overlap=40)
