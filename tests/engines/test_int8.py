"""The int8 engine: products of what was rounded are exact, what is sensitive is not rounded, and errors are small."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gobelin.checkpoint import Model
from gobelin.engines import Engine, PaintingNetworks, find_engine, int8_weights
from gobelin.engines.eager import EagerEngine
from gobelin.engines.int8_weights import SENSITIVE, can_multiply_int8, pack_in_int8
from gobelin.engines.packed_weights import pack_as_it_is
from gobelin.errors import UsageError
from gobelin.kernels.quantize import quantize_samples
from gobelin.pipeline import Pipeline
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

needs_int8 = pytest.mark.skipif(not can_multiply_int8(), reason="needs a CPU that multiplies int8 and bfloat16")

LAYERS = [
    nn.Conv2d(5, 7, 3, padding=1),
    nn.Conv2d(4, 8, 1),
    nn.Conv2d(6, 6, 3, stride=2, padding=1),
    nn.Conv2d(6, 4, (3, 1), stride=(1, 2), padding=(2, 0), bias=False),
    nn.Conv2d(6, 6, 3, stride=2),
    nn.Linear(7, 5),
    nn.Linear(1, 9, bias=False),
    nn.Linear(640, 130),
]
ROUNDING = 2**-8  # of what bfloat16 holds


def given_to(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return F.silu(torch.randn(2, layer.in_channels, 9, 11)).bfloat16().contiguous(memory_format=torch.channels_last)
    assert isinstance(layer, nn.Linear)
    return torch.randn(2, 13, layer.in_features).bfloat16()


def rounded_weight(weight: Tensor) -> Tensor:
    scales = weight.double().flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1)) / 127
    return (weight.double() / scales).round() * scales


def rounded_input(given: Tensor) -> Tensor:
    last = given.permute(0, 2, 3, 1) if given.ndim == 4 else given
    values, scales, zero_points = quantize_samples(last)
    shape = (-1, *[1] * (last.ndim - 1))
    last = (values.double() - torch.tensor(zero_points).view(shape)) * torch.tensor(scales).double().view(shape)
    return last.permute(0, 3, 1, 2) if given.ndim == 4 else last


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_products_of_what_was_rounded_are_exact(layer: nn.Conv2d | nn.Linear) -> None:
    layer = layer.bfloat16().requires_grad_(False)
    given = given_to(layer)
    ours = pack_in_int8("somewhere", layer)(given)
    weight, bias = rounded_weight(layer.weight), None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Conv2d):
        truth = F.conv2d(rounded_input(given), weight, bias, layer.stride, layer.padding)
        assert ours.is_contiguous(memory_format=torch.channels_last)
    else:
        truth = F.linear(rounded_input(given), weight, bias)
    assert ours.dtype == torch.bfloat16
    assert ours.shape == truth.shape
    assert error(ours, truth) <= ROUNDING
    assert error(ours, layer.double()(given.double())) <= 0.03
    layer.bfloat16()


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_sample_does_not_depend_on_its_neighbour(layer: nn.Conv2d | nn.Linear) -> None:
    forward, given = pack_in_int8("somewhere", layer.bfloat16()), given_to(layer)
    given[1] *= 50
    assert torch.equal(forward(given)[:1], forward(given[:1]))


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    config = UNetConfig.of(64, 96, attention=(True, False), cross_attention_dim=24, layers_per_block=1)
    return UNet(config).bfloat16().eval().requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 8, 8).bfloat16(), torch.tensor([400.0, 400.0]), torch.randn(2, 7, 24).bfloat16()


def engine_of(unet: UNet) -> Engine:
    model = SimpleNamespace(unet=unet, vae=VAE(VAEConfig.nano()))
    return find_engine("int8")(cast(PaintingNetworks, model))


@needs_int8
@torch.no_grad()
def test_a_network_is_rounded_once_more_than_in_bfloat16_and_traced_alike(unet: UNet) -> None:
    given = inputs()
    packed = engine_of(unet).unet
    ours, plain = packed(*given), unet(*given)
    traced, maps = packed.trace(*given)
    _, their_maps = unet.trace(*given)
    truth = unet.double()(*(one.double() for one in given))
    assert 2 * error(plain, truth) < error(ours, truth) < 0.1
    assert torch.equal(traced, ours)
    for site, one in maps.items():
        assert (one - their_maps[site]).abs().max() < 0.05


@needs_int8
@torch.no_grad()
def test_sensitive_layers_are_as_in_bfloat16_and_no_others(unet: UNet) -> None:
    found = set()
    for name, layer in unet.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if isinstance(layer, nn.Conv2d):
            given = torch.randn(1, layer.in_channels, 6, 6).bfloat16().contiguous(memory_format=torch.channels_last)
        else:
            given = torch.randn(1, 8, layer.in_features).bfloat16()
        if torch.equal(pack_in_int8(name, layer)(given), pack_as_it_is(name, layer)(given)):
            found.add(name)
    ends = ("conv_in", "conv_out", "linear_1", "linear_2", "time_emb_proj", "conv_shortcut", "attn2.to_k", "attn2.to_v")
    assert found == {name for name, _ in unet.named_modules() if name.endswith(ends)}
    assert len(SENSITIVE) == 6


@needs_int8
def test_gradients_and_written_weights_are_the_networks_own(unet: UNet) -> None:
    engine, given = engine_of(unet), inputs()
    with torch.no_grad():
        before = engine.unet(*given)
        unet.get_parameter("mid_block.resnets.0.conv1.weight").data.mul_(-1)
        after = engine.unet(*given)
        assert error(after, before) > 0.01
        assert error(after, unet(*given)) < 0.1
    latents = given[0].requires_grad_()
    (grad,) = torch.autograd.grad(engine.unet(latents, *given[1:]).sum(), latents)
    (truth,) = torch.autograd.grad(unet(latents, *given[1:]).sum(), latents)
    assert error(grad, truth) < 0.05  # both round, in another order: the maps of one are channels last


@needs_int8
def test_a_model_in_another_precision_is_refused_and_painted_eagerly_after_a_move(
    clip_model: Callable[..., Model],
) -> None:
    pipe = Pipeline(clip_model())
    with pytest.raises(UsageError, match="engine int8 runs models in bfloat16, and this one is in float32"):
        pipe.use("int8")
    pipe.to(torch.bfloat16).use("int8")
    assert pipe.engine == "int8"
    assert pipe("a red circle", seed=1, steps=2).images
    with pytest.warns(UserWarning, match="in bfloat16.*until then the engine is eager"):
        assert pipe.to(torch.float32).engine == "eager"


def test_a_machine_that_cannot_is_named_before_a_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_weights, "has_instructions", lambda name: name != "avx512_vnni")
    with pytest.raises(UsageError, match="needs a CPU with AVX-512's VNNI and BF16"):
        Pipeline.from_pretrained("/nowhere", engine="int8")


@needs_int8
@torch.no_grad()
def test_without_memory_for_its_weights_it_is_eager(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, given = engine_of(unet), inputs()
    monkeypatch.setattr("gobelin.engines.packed_weights.has_room_for", lambda network: False)
    with pytest.warns(UserWarning, match="no memory for the weights of the engine int8"):
        network = engine.unet
    assert isinstance(engine, EagerEngine)
    assert torch.equal(network(*given), EagerEngine.of(engine.model).unet(*given))
