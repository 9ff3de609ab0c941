"""Packed weights: the same numbers as a network's own, up to rounding, and never those that it had before."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from gobelin.engines import packed_weights
from gobelin.engines.packed_weights import PackedWeights, pays
from gobelin.kernels.hardware import has_bfloat16, has_instructions
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")

HAS_BFLOAT16 = has_bfloat16(torch.device("cpu"))
DTYPE = torch.bfloat16 if HAS_BFLOAT16 else torch.float32
DTYPES = [torch.float32] + [torch.bfloat16] * HAS_BFLOAT16

CONVOLUTIONS = [
    nn.Conv2d(5, 7, 3, padding=1),
    nn.Conv2d(4, 8, 1),
    nn.Conv2d(6, 6, 3, stride=2, padding=1),
    nn.Conv2d(6, 4, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1), bias=False),
    nn.Conv2d(6, 9, 3, padding=1, groups=3),
    nn.Conv2d(6, 6, 3, stride=2),
]

LINEARS = [nn.Linear(7, 5), nn.Linear(1, 9, bias=False), nn.Linear(64, 130)]


def packed(network: nn.Module, dtype: torch.dtype = DTYPE) -> PackedWeights:
    weights = PackedWeights(network.to(dtype).requires_grad_(False))
    weights.update()
    return weights


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("layer", [*CONVOLUTIONS, *LINEARS], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_computes_the_same(layer: nn.Module, last: bool, dtype: torch.dtype) -> None:
    layer = nn.Sequential(layer)
    weights = packed(layer, dtype)
    if isinstance(layer[0], nn.Conv2d):
        given = torch.randn(2, layer[0].in_channels, 9, 11).to(dtype)
        given = given.contiguous(memory_format=torch.channels_last) if last else given
    else:
        given = torch.randn(2, 13, 3 * layer[0].in_features).to(dtype)[..., :: 3 if last else 1]
        given = given[..., : layer[0].in_features]
    plain, truth = layer(given), nn.Sequential(layer[0]).double()(given.double())
    layer.to(dtype)
    weights.update()
    with weights.in_use():
        assert "forward" in vars(layer[0])
        ours = layer(given)
    assert "forward" not in vars(layer[0])
    assert ours.shape == plain.shape
    assert ours.dtype == dtype
    assert error(ours, truth) <= 1.1 * error(plain, truth) + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_computes_maps_of_any_size_one_after_the_other(dtype: torch.dtype) -> None:
    layer = nn.Sequential(nn.Conv2d(6, 40, 3, padding=1))
    weights = packed(layer, dtype)
    sizes = [(1, 8, 8), (2, 8, 8), (1, 8, 8), (1, 33, 5), (3, 1, 1), (1, 8, 8)]
    for batch, height, width in sizes:
        given = torch.randn(batch, 6, height, width, dtype=dtype)
        with weights.in_use():
            ours = layer(given)
        assert error(ours, layer(given)) <= (1e-2 if dtype == torch.bfloat16 else 1e-5)


@torch.no_grad()
def test_padding_that_is_named_goes_by_the_layer_itself() -> None:
    layer = nn.Sequential(nn.Conv2d(6, 6, 3, padding="same"))
    weights, given = packed(layer), torch.randn(1, 6, 5, 4, dtype=DTYPE)
    with weights.in_use():
        assert torch.equal(layer(given), layer[0](given))


REORDERS = """
import torch
from torch import nn
from gobelin.engines.packed_weights import PackedWeights

dtype = getattr(torch, "%s")
# Sizes that oneDNN has different orders for on CPUs with AVX2.
for inputs, outputs, side in ((960, 640, 8), (960, 320, 16), (1280, 640, 4)):
    layer = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1)).to(dtype).requires_grad_(False)
    weights = PackedWeights(layer)
    weights.update()
    given = torch.randn(1, inputs, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), weights.in_use():
        layer(given)
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            layer(given)
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_is_put_in_order_at_a_call(dtype: torch.dtype) -> None:
    program = REORDERS % str(dtype).removeprefix("torch.")
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.count("exec,cpu,convolution") == 3
    assert "exec,cpu,reorder" not in said


WRITES: dict[str, Callable[[nn.Linear], object]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "through data": lambda layer: layer.weight.data.mul_(2),
    "a sign, through data": lambda layer: layer.weight.data[3, 4].neg_(),
    "other data": lambda layer: setattr(layer.weight, "data", layer.weight * 2),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
    "a state": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "the bias": lambda layer: layer.bias.data.add_(1),
    "another precision and back": lambda layer: layer.half().to(DTYPE),
}


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_to_a_weight_is_seen(write: Callable[[nn.Linear], object]) -> None:
    network = nn.Sequential(nn.Linear(9, 33), nn.Linear(33, 5))
    weights = packed(network)
    given = torch.randn(4, 9, dtype=DTYPE)
    write(network[0])
    weights.update()
    with weights.in_use():
        ours = network(given)
    assert error(ours, network(given)) <= 0.01


@torch.no_grad()
def test_only_what_has_changed_is_packed_again() -> None:
    network = nn.Sequential(nn.Linear(9, 33), nn.Linear(33, 5))
    weights = packed(network)
    before = dict(weights._packed)
    network[1].weight.data[0, 0] += 1
    weights.update()
    assert weights._packed[network[0]] is before[network[0]]
    assert weights._packed[network[1]] is not before[network[1]]


@torch.no_grad()
def test_hooks_other_forwards_and_other_classes_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, given: Tensor) -> Tensor:
            return 2 * super().forward(given)

    network = nn.Sequential(nn.Linear(9, 9), Doubled(9, 9), nn.Linear(9, 9))
    weights = packed(network)
    calls = []
    network[0].register_forward_hook(lambda *_: calls.append(1))
    network[2].forward = lambda given: given + 1  # type: ignore[method-assign]
    given = torch.randn(4, 9, dtype=DTYPE)
    with weights.in_use():
        ours = network(given)
    assert calls == [1]
    assert error(ours, network(given)) <= 0.01
    assert "forward" in vars(network[2])


def test_gradients_and_other_precisions_go_by_the_weights_themselves() -> None:
    network = nn.Sequential(nn.Linear(9, 9), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 2, 3))
    weights = packed(network)
    given = torch.randn(4, 9, dtype=DTYPE).requires_grad_()
    with weights.in_use():
        torch.autograd.grad(network(given).sum(), given)
        with torch.autocast("cpu", torch.bfloat16):
            assert network(torch.randn(4, 9)).dtype == torch.bfloat16


def test_the_state_of_a_network_stays_its_own_while_its_packed_weights_are_in_use() -> None:
    network = nn.Sequential(nn.Linear(9, 9))
    weights = packed(network)
    before = network.state_dict()
    with weights.in_use():
        assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
    with pytest.raises(ZeroDivisionError), weights.in_use():
        raise ZeroDivisionError
    assert "forward" not in vars(network[0])


def test_it_pays_for_wide_networks_where_the_cpu_multiplies_packed_weights_faster() -> None:
    with torch.device("meta"):
        wide, vae, narrow = UNet(UNetConfig.sd15()), VAE(VAEConfig.sd15()), UNet(UNetConfig.tiny())
    assert not pays(wide.bfloat16())  # where the meta device is, no product is
    small = UNet(UNetConfig.of(128, attention=(True,), cross_attention_dim=8, layers_per_block=1))
    assert pays(small) is has_instructions("avx2")
    assert not pays(small.half())
    assert pays(small.bfloat16()) is HAS_BFLOAT16
    assert not pays(UNet(UNetConfig.nano()).bfloat16())
    assert min(wide.config.block_out_channels + vae.config.block_out_channels) >= 128
    assert narrow.config.block_out_channels[0] < 128


def test_without_the_memory_for_them_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(64, 64)).to(DTYPE).requires_grad_(False)
    weights = PackedWeights(network)
    monkeypatch.setattr(packed_weights, "Path", lambda _: SimpleNamespace(read_text=lambda: "MemAvailable:  16 kB\n"))
    weights.update()
    with weights.in_use():
        assert "forward" not in vars(network[0])
    monkeypatch.undo()
    weights.update()
    with weights.in_use():
        assert "forward" in vars(network[0])
