"""A fused layer against the same layer in float64, norm, activation, window, gate and sums one by one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gobelin.kernels.fused_layer import FusedLayer, computes_fused_layers

pytestmark = pytest.mark.skipif(
    not computes_fused_layers(torch.float32), reason="needs a C++ compiler and a CPU with AVX2"
)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not computes_fused_layers(request.param):
        pytest.skip("needs a CPU with AVX512-BF16")
    return request.param


def rounding(dtype: torch.dtype, roundings: int) -> float:
    """The relative error that so many roundings on the way may make."""
    return roundings * torch.finfo(dtype).eps / 2 + 6e-7


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()


def made(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A layer with weights of that precision, none of which is 0 or 1."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.3, 0.5)
    return layer.to(dtype).requires_grad_(False)


def exactly(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer computes in float64."""
    parameters = {name: parameter.double() for name, parameter in layer.named_parameters()}
    return torch.func.functional_call(layer, parameters, (x,))


@pytest.mark.parametrize("out_channels", [1, 4, 16, 33, 48, 64, 100, 144])
@pytest.mark.parametrize(("side", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_convolutions_with_a_norm_before_and_sums_behind(
    dtype: torch.dtype, out_channels: int, side: int, stride: int
) -> None:
    norm = made(nn.GroupNorm(8, 40, eps=1e-5), dtype)
    layer = made(nn.Conv2d(40, out_channels, side, stride, side // 2), dtype)
    x, shift = torch.randn(3, 7, 9, 40).to(dtype), torch.randn(3, out_channels).to(dtype)
    truth = exactly(layer, F.silu(exactly(norm, x.permute(0, 3, 1, 2).double())))
    truth = (truth + shift.double()[:, :, None, None]).permute(0, 2, 3, 1)
    residual = torch.randn_like(truth).to(dtype)
    fused = FusedLayer(layer.weight, layer.bias, norm=norm, silu=True, stride=stride)
    assert error(fused.map(x, shift=shift, residual=residual), truth + residual.double()) <= rounding(dtype, 2)


@pytest.mark.parametrize("size", [(14, 18), (13, 17), (8, 30), (7, 9)])
def test_a_map_is_enlarged_as_torch_enlarges_it(dtype: torch.dtype, size: tuple[int, int]) -> None:
    layer, x = made(nn.Conv2d(12, 20, 3, padding=1), dtype), torch.randn(2, 7, 9, 12).to(dtype)
    grown = F.interpolate(x.permute(0, 3, 1, 2).double(), size=size, mode="nearest")
    assert error(
        FusedLayer(layer.weight, layer.bias).map(x, size), exactly(layer, grown).permute(0, 2, 3, 1)
    ) <= rounding(dtype, 1)


@pytest.mark.parametrize(("rows", "width", "inside"), [(1, 2, 1), (13, 40, 72), (200, 48, 48), (9, 144, 100)])
def test_rows_with_a_layer_norm_and_a_gate(dtype: torch.dtype, rows: int, width: int, inside: int) -> None:
    norm, layer = made(nn.LayerNorm(width), dtype), made(nn.Linear(width, 2 * inside), dtype)
    x = torch.randn(2, rows, width).to(dtype)
    hidden, gate = exactly(layer, exactly(norm, x.double())).chunk(2, dim=-1)
    ours = FusedLayer(layer.weight, layer.bias, norm=norm, geglu=True).rows(x)
    assert error(ours, hidden * F.gelu(gate)) <= rounding(dtype, 4)


@pytest.mark.parametrize("function", ["silu", "gelu"])
def test_functions_are_as_exact_as_torchs(function: str) -> None:
    x = torch.cat(
        [torch.linspace(-90, 90, 4000), torch.linspace(-4, 4, 4000), torch.tensor([0.0, -0.0, 1e-30, -1e-30])]
    )
    one = torch.ones(1, 1)
    if function == "silu":
        ours, truth = FusedLayer(one, silu=True).rows(x[:, None]), F.silu(x.double())
    else:
        gated = FusedLayer(torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 0.0]), geglu=True)
        ours, truth = gated.rows(x[:, None]), F.gelu(x.double())
    # As shares of x; of torch's own GELU the largest is 3.3e-7.
    assert ((ours[:, 0].double() - truth).abs() <= 3.3e-7 * x.abs()).all()


def test_what_is_no_number_stays_in_its_sample(dtype: torch.dtype) -> None:
    norm, layer = made(nn.GroupNorm(2, 8), dtype), made(nn.Conv2d(8, 5, 3, padding=1), dtype)
    x = torch.randn(2, 4, 4, 8).to(dtype)
    x[1, 2, 3, 4] = torch.nan
    ours = FusedLayer(layer.weight, layer.bias, norm=norm, silu=True).map(x)
    assert ours[0].isfinite().all()
    assert ours[1, 1:, 2:].isnan().all()


def test_a_residual_may_be_written_over(dtype: torch.dtype) -> None:
    layer = FusedLayer(made(nn.Linear(24, 24), dtype).weight)
    x = torch.randn(70, 24).to(dtype)
    before = layer.rows(x, slot="a slot").clone()
    again = layer.rows(x, residual=layer.rows(x, slot="a slot"), slot="a slot")
    assert torch.equal(again, layer.rows(x, residual=before))


def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    norm, layer = made(nn.GroupNorm(4, 24), dtype), made(nn.Conv2d(24, 60, 3, padding=1), dtype)
    fused, x = FusedLayer(layer.weight, layer.bias, norm=norm, silu=True), torch.randn(5, 9, 7, 24).to(dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(fused.map(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], one) for one in found)


def test_what_does_not_fit_is_refused(dtype: torch.dtype) -> None:
    layer = FusedLayer(made(nn.Linear(8, 8), dtype).weight)
    for wrong in (torch.randn(2, 6).to(dtype), torch.randn(2, 8).double()):
        with pytest.raises(ValueError, match="the layer has 8 channels of"):
            layer.rows(wrong)


def test_without_a_compiler_there_are_none(tmp_path: Path) -> None:
    code = (
        "import torch; from gobelin.kernels.fused_layer import computes_fused_layers\n"
        "assert not computes_fused_layers(torch.float32)"
    )
    environment = {**os.environ, "CXX": "/nowhere/c++", "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
