"""The eager engine, where it packs weights, a wide U-Net and VAE in bfloat16, and where it unfolds convolutions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gobelin.attention import AttentionEdit
from gobelin.checkpoint import Model
from gobelin.engines import packed_weights, unfolded_convolutions
from gobelin.engines.eager import EagerEngine, PreparedDecoder, PreparedUNet, UnfoldedUNet
from gobelin.engines.packed_weights import PackedWeights
from gobelin.kernels.hardware import has_bfloat16
from gobelin.pipeline import Pipeline
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

pytestmark = pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="needs a CPU that multiplies bfloat16")

UNET = UNetConfig.of(
    *(128, 192), attention=(True, True), layers_per_block=1, cross_attention_dim=24, attention_head_dim=4, sample_size=8
)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNET).bfloat16().requires_grad_(False).eval()


def inputs(batch: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    latents = torch.randn(batch, 4, height, width).bfloat16()
    return latents, torch.rand(batch) * 999, torch.randn(batch, 7, 24).bfloat16()


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 7, 5), (2, 1, 9)])
def test_it_is_as_near_to_float32_as_the_network_itself(unet: UNet, batch: int, height: int, width: int) -> None:
    given = inputs(batch, height, width)
    mask = torch.arange(7) < torch.randint(1, 8, (batch, 1))
    exact = UNet(UNET).eval()
    exact.load_state_dict(unet.float().state_dict())
    unet.bfloat16()
    truth = exact(given[0].float(), given[1], given[2].float(), mask)
    packed = PreparedUNet(unet, PackedWeights(unet)).updated()
    assert error(packed(*given, mask), truth) <= 1.2 * error(unet(*given, mask), truth)


@torch.no_grad()
def test_tracing_changes_no_bit(unet: UNet) -> None:
    given = inputs(2, 6, 8)
    packed = PreparedUNet(unet, PackedWeights(unet)).updated()
    traced, maps = packed.trace(*given, rows=slice(1, None))
    assert torch.equal(traced, packed(*given))
    kept, _ = packed.trace(*given, sites="*", edits=[AttentionEdit(change=lambda site, probs: probs, sites="*")])
    assert torch.equal(kept, traced)
    _, plain = unet.trace(*given, rows=slice(1, None))
    assert list(maps) == list(plain)
    assert all(error(maps[site], plain[site]) < 0.05 for site in maps)


@pytest.fixture
def pipe(clip_model: Callable[..., Model], unet: UNet) -> Pipeline:
    model = clip_model()
    wide = UNetConfig(**{**vars(UNET), "cross_attention_dim": model.unet.config.cross_attention_dim})
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(128, 128), layers_per_block=1, latent_channels=4))
    made = Model(**{**vars(model), "unet": UNet(wide), "vae": vae})
    return Pipeline(made).to("cpu", "bfloat16")


def test_a_pipeline_paints_with_packed_weights(pipe: Pipeline) -> None:
    engine = EagerEngine.of(pipe.model)
    assert isinstance(engine.unet, PreparedUNet)
    assert isinstance(engine.vae, PreparedDecoder)
    first = pipe("a red circle", seed=1, steps=2)
    assert torch.equal(first.latents, pipe("a red circle", seed=1, steps=2, trace=True).latents)
    assert first.images[0].size == (16, 16)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a PyTorch with MKL")
def test_a_pipeline_paints_with_unfolded_convolutions(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "has_room_for", lambda network: False)
    pipe = pipe.to(dtype="float32")
    plain = pipe("a red circle", seed=1, steps=2).latents
    monkeypatch.setattr(unfolded_convolutions, "_WIDE", 128)
    assert isinstance(EagerEngine.of(pipe.model).unet, UnfoldedUNet)
    ours = pipe("a red circle", seed=1, steps=2).latents
    assert not torch.equal(ours, plain)
    assert error(ours, plain) <= 1e-5
    assert torch.equal(ours, pipe("a red circle", seed=1, steps=2, trace=True).latents)


def test_what_changes_between_two_paintings_is_seen(pipe: Pipeline) -> None:
    before = pipe("a red circle", seed=1, steps=1)
    pipe.unet.conv_out.weight.data.mul_(3)
    pipe.vae.decoder.conv_out.weight.data.mul_(-1)
    changed = pipe("a red circle", seed=1, steps=1)
    assert not torch.equal(before.latents, changed.latents)
    fresh = Pipeline(pipe.model)("a red circle", seed=1, steps=1)
    assert torch.equal(changed.latents, fresh.latents)
    assert changed.images[0].tobytes() == fresh.images[0].tobytes()


def test_another_precision_is_computed_in(pipe: Pipeline, tmp_path: Path) -> None:
    pipe("a red circle", seed=1, steps=1)
    exact = pipe.to(dtype="float32")("a red circle", seed=1, steps=1)
    assert exact.latents.isfinite().all()
    assert isinstance(EagerEngine.of(pipe.model).unet, PreparedUNet if packed_weights.pays(pipe.unet) else UNet)
    pipe.save_pretrained(tmp_path / "saved")
    again = Pipeline.from_pretrained(tmp_path / "saved")("a red circle", seed=1, steps=1)
    assert torch.equal(exact.latents, again.latents)
