"""Training computes in bfloat16 where the device does so in hardware, and in float32 elsewhere."""

import pytest
import torch
from torch import nn

from gobelin.adapters.adapter_settings import AdapterConfig
from gobelin.adapters.trainable import adapter_parameters, add_adapters_
from gobelin.training import find_preset
from gobelin.training.precision import RoundedWeights, autocast
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

CPU = torch.device("cpu")


def computed(precision, device=CPU):
    with autocast(device, precision):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_asks_the_processor(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert computed("auto") == expected
    assert computed("bfloat16") == torch.bfloat16
    assert computed("float32") == torch.float32


def test_presets_leave_it_to_the_device():
    for name in ("nano", "tiny"):
        config = find_preset(name)
        assert {config.text.optim.precision, config.unet.optim.precision} == {"auto"}


def unet_with_adapters() -> UNet:
    torch.manual_seed(0)
    unet = UNet(UNetConfig.nano())
    add_adapters_(unet, AdapterConfig(rank=2, targets="all"), torch.Generator().manual_seed(0))
    for parameter in adapter_parameters(unet):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return unet


def step(unet, rounded):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    with rounded.in_place():
        with autocast(CPU, "bfloat16"):
            loss = unet(latents, torch.tensor([3.0, 700.0]), text).float().square().mean()
        loss.backward()
    return loss


def test_frozen_weights_that_are_rounded_once_change_no_bit():
    """Of loss and gradients, where kernels lie in memory alike; afterwards the weights are what they were."""
    plain, other = unet_with_adapters().to(memory_format=torch.channels_last), unet_with_adapters()
    rounded = RoundedWeights(other, CPU, "bfloat16")
    before = {name: value.clone() for name, value in other.named_parameters()}
    seen = []
    other.mid_block.register_forward_hook(lambda *_: seen.append(other.conv_in.weight.dtype))
    losses = step(plain, RoundedWeights(plain, CPU, "float32")), step(other, rounded)
    assert torch.equal(*losses)
    assert seen == [torch.bfloat16]
    for one, same in zip(adapter_parameters(plain), adapter_parameters(other), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, same.grad)
    for name, value in other.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_weights_are_whole_again_after_an_error_and_trained_ones_are_left_alone():
    layer, trained = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)
    both = nn.Sequential(layer, trained, nn.LayerNorm(3).requires_grad_(False))
    rounded = RoundedWeights(both, CPU, "bfloat16")
    with rounded.in_place():
        assert [one.dtype for one in both.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 4
    with pytest.raises(RuntimeError, match="shapes"), rounded.in_place():
        layer(torch.zeros(1, 2, dtype=torch.bfloat16))
    assert {one.dtype for one in both.parameters()} == {torch.float32}
    with RoundedWeights(both, CPU, "float32").in_place():
        assert layer.weight.dtype == torch.float32
