"""Frozen weights that are rounded and packed once give the numbers of those that are in every step."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from gobelin.adapters.adapter_settings import AdapterConfig
from gobelin.adapters.trainable import adapter_parameters, add_adapters_
from gobelin.kernels.hardware import has_instructions
from gobelin.operations import Conv2d
from gobelin.training.frozen_weights import FrozenWeights
from gobelin.training.precision import autocast
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

CPU = torch.device("cpu")
FEW, MANY = 8, 32  # sides of maps whose convolutions are packed, and are not


def unet_with_adapters(targets) -> UNet:
    torch.manual_seed(0)
    unet = UNet(UNetConfig.nano()).to(memory_format=torch.channels_last)
    add_adapters_(unet, AdapterConfig(rank=2, targets=targets), torch.Generator().manual_seed(0))
    for parameter in adapter_parameters(unet):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return unet


def step(unet, in_use, precision, side):
    generator = torch.Generator().manual_seed(side)
    latents = torch.randn(2, unet.config.in_channels, side, side, generator=generator)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    with in_use:
        with autocast(CPU, precision):
            loss = unet(latents, torch.tensor([3.0, 700.0]), text).float().square().mean()
        loss.backward()
    return loss


def gradients(unet) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in adapter_parameters(unet)])


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.0), ("float32", 1e-5)])
def test_they_change_nothing(targets, precision, tolerance):
    """Of loss and gradients, in steps of maps of several sizes; afterwards the weights are what they were.

    In bfloat16 with AMX oneDNN adds up a packed convolution in another order: there the numbers are to be as near to
    float32's as without.
    """
    reordered = precision == "bfloat16" and has_instructions("amx_bf16")
    plain, other, exact = (unet_with_adapters(targets) for _ in range(3))
    frozen = FrozenWeights(other, CPU, precision)
    before = {name: value.clone() for name, value in other.named_parameters()}
    for side in (FEW, MANY, FEW // 2, FEW):
        expected, found = (
            step(unet, use, precision, side) for unet, use in ((plain, nullcontext()), (other, frozen.in_use()))
        )
        torch.testing.assert_close(found, expected, rtol=2**-7 if reordered else tolerance, atol=0.0)
        if reordered:
            step(exact, nullcontext(), "float32", side)
            wrong, as_wrong = ((gradients(unet) - gradients(exact)).norm() for unet in (other, plain))
            assert wrong <= 1.1 * as_wrong
        else:
            for one, same in zip(adapter_parameters(plain), adapter_parameters(other), strict=True):
                assert one.grad is not None
                torch.testing.assert_close(same.grad, one.grad, rtol=tolerance, atol=tolerance * one.grad.abs().max())
        for unet in (plain, other, exact):
            unet.zero_grad()
    for name, value in other.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (1, 5, 4, 7), (3, 5, 13, 13), (1, 5, 30, 31)])
def test_a_convolution_and_its_gradient_are_those_in_float64(dtype, bias, shape):
    torch.manual_seed(0)
    layer = Conv2d(5, 19, 3, padding=1, bias=bias).requires_grad_(False)
    exact = nn.Conv2d(5, 19, 3, padding=1, bias=bias).requires_grad_(False).double()
    exact.load_state_dict({name: value.to(dtype) for name, value in layer.state_dict().items()})
    hidden = torch.randn(shape).to(dtype)
    gradient = torch.randn(shape[0], 19, *shape[2:]).to(dtype)
    found, expected = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    with FrozenWeights(layer, CPU, "float32" if dtype == torch.float32 else "bfloat16").in_use():
        out = layer(found)
        assert out.dtype == dtype
        out.backward(gradient)
    exact(expected).backward(gradient.double())
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), exact(expected), rtol=bound, atol=bound)
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=bound, atol=bound)


def test_only_plain_frozen_convolutions_are_packed(monkeypatch):
    def packed(layer):
        with FrozenWeights(layer, CPU, "float32").in_use():
            return "forward" in vars(layer)

    assert packed(nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False))
    assert not packed(nn.Conv2d(2, 2, 3, padding=1))
    trained_bias = nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False)
    trained_bias.bias.requires_grad_(True)
    assert not packed(trained_bias)
    others = {"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"}
    for other in others:
        assert not packed(nn.Conv2d(2, 2, 3, **{"padding": 1, **other}).requires_grad_(False)), other
    compiled = nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False)
    compiled.compile()
    assert not packed(compiled)
    monkeypatch.setattr("gobelin.training.frozen_weights.has_room_for", lambda module: False)
    assert not packed(nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False)), "memory is short"


def test_weights_are_whole_again_after_an_error_and_trained_ones_are_left_alone():
    layer, trained = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)
    convolution = nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False)
    both = nn.Sequential(layer, trained, nn.LayerNorm(3).requires_grad_(False), convolution)
    frozen = FrozenWeights(both, CPU, "bfloat16")
    with frozen.in_use():
        assert [one.dtype for one in both[:3].parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 4
    with pytest.raises(RuntimeError, match="shapes"), frozen.in_use():
        layer(torch.zeros(1, 2, dtype=torch.bfloat16))
    assert {one.dtype for one in both.parameters()} == {torch.float32}
    assert "forward" not in vars(convolution)
    with FrozenWeights(both, CPU, "float32").in_use():
        assert layer.weight.dtype == torch.float32
