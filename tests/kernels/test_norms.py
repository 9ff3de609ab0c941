"""The kernels of group norm and layer norm against float64, beside torch's own in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.there_and_back import assert_near, there_and_back
from torch import Tensor, nn

from gobelin.kernels import norms
from gobelin.operations import GroupNorm, LayerNorm

pytestmark = pytest.mark.skipif(not norms.has_norms(), reason="needs a C++ compiler and a CPU with AVX512-BF16")


class NormAndSiLU(nn.Module):
    """Group norm and SiLU, in one call or in two."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, silu=True) if isinstance(self.norm, GroupNorm) else F.silu(self.norm(x))


def drawn(norm):
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def twins(ours: nn.Module, plain: nn.Module) -> tuple[nn.Module, nn.Module]:
    plain.load_state_dict(drawn(ours).state_dict())
    return ours, plain


def made(*shape: int) -> Tensor:
    return (torch.randn(shape) + 0.5).bfloat16()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("groups", "shape"),
    [(16, (2, 48, 16, 16)), (1, (1, 1, 1, 2)), (5, (3, 35, 3, 7)), (3, (2, 51, 5, 1)), (32, (1, 64, 33, 17))],
)
def test_group_norm_is_as_near_to_float64_as_torchs(groups, shape, channels_last, silu) -> None:
    x = made(*shape)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    ours, plain = twins(GroupNorm(groups, shape[1]), nn.GroupNorm(groups, shape[1]))
    if silu:
        ours, plain = NormAndSiLU(ours), NormAndSiLU(plain)
    assert_near(ours, x, plain)
    for result in there_and_back(ours, x)[:2]:
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 256, 48), (64, 96), (1, 2), (7, 3, 37), (65, 16), (130, 200)], ids=str)
def test_layer_norm_is_as_near_to_float64_as_torchs(shape) -> None:
    ours, plain = twins(LayerNorm(shape[-1]), nn.LayerNorm(shape[-1]))
    assert_near(ours, made(*shape), plain)


@pytest.mark.parametrize("layer", [GroupNorm(4, 24), LayerNorm(10)], ids=["group", "layer"])
def test_any_strides_will_do(layer) -> None:
    layer = drawn(layer)
    for x in (
        made(3, 24, 10, 7).transpose(2, 3),
        made(3, 48, 7, 20)[:, ::2, :, ::2],
        made(1, 24, 7, 10).expand(3, -1, -1, -1),
    ):
        x = x if isinstance(layer, GroupNorm) else x[..., :10]
        same = there_and_back(layer, x.clone(memory_format=torch.contiguous_format))
        assert all(torch.equal(one, other) for one, other in zip(there_and_back(layer, x), same, strict=True))


def test_a_large_mean_costs_no_precision() -> None:
    x = (100 + made(2, 16, 8, 8).float()).bfloat16()
    for layer, plain in ((GroupNorm(4, 16), nn.GroupNorm(4, 16)), (LayerNorm(8), nn.LayerNorm(8))):
        assert_near(layer, x, plain)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group_and_is_not_hidden(bad) -> None:
    x = made(3, 24, 5, 5)
    x[1, 7, 2, 2] = bad
    there = torch.zeros(3, 24, 5, 5, dtype=torch.bool)
    there[1, 6:12] = True
    for each in there_and_back(NormAndSiLU(drawn(GroupNorm(4, 24))), x)[:2]:
        assert torch.equal(each.isnan(), there)
    rows = made(3, 24)
    rows[1, 7] = bad
    for each in there_and_back(drawn(LayerNorm(24)), rows)[:2]:
        assert torch.equal(each.isnan().any(dim=1), torch.tensor([False, True, False]))


def test_sigmoids_of_large_numbers_are_zero_and_one() -> None:
    layer = GroupNorm(1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1e30, -1e30]))
    out, dx, *_ = there_and_back(NormAndSiLU(layer), made(1, 2, 4, 4))
    assert out.isfinite().all()
    assert ((out == 0) | (out.abs() > 1e20)).all()
    assert not dx.isnan().any()


def test_bits_do_not_depend_on_threads() -> None:
    before, runs = torch.get_num_threads(), []
    layers = drawn(GroupNorm(4, 24)), drawn(LayerNorm(40))
    inputs = made(5, 24, 9, 9), made(5, 100, 40)
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        runs.append([each for layer, x in zip(layers, inputs, strict=True) for each in there_and_back(layer, x)])
    torch.set_num_threads(before)
    for one in runs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(one, runs[0], strict=True))


def test_the_operators_are_what_torch_expects_of_operators() -> None:
    weight, bias = torch.randn(24).requires_grad_(), torch.randn(24).requires_grad_()
    x = made(2, 24, 5, 3).requires_grad_()
    torch.library.opcheck(norms._group_norm, (x, weight, bias, 4, 1e-5, True))
    torch.library.opcheck(norms._layer_norm, (made(2, 5, 24).requires_grad_(), weight, bias, 1e-5))


def test_what_does_not_fit_is_refused() -> None:
    x, weight = made(2, 24, 5, 3), torch.ones(24)
    for bad in (x.float(), x[:0], x[:, :12]):
        with pytest.raises(ValueError, match="give bfloat16"):
            norms._group_norm(bad, weight, weight, 4, 1e-5, True)
    with pytest.raises(ValueError, match="give bfloat16"):
        norms._layer_norm(x, weight, weight, 1e-5)
    with pytest.raises(ValueError, match="5 groups"):
        norms._group_norm(x, weight, weight, 5, 1e-5, True)


def test_second_derivatives_are_refused() -> None:
    x = made(2, 24, 5, 3).requires_grad_()
    for layer, each in ((GroupNorm(4, 24), x), (LayerNorm(3), x)):
        (dx,) = torch.autograd.grad(layer(each).float().square().sum(), each, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(dx.float().sum(), each)


def test_only_what_trains_in_bfloat16_goes_through_the_kernel(monkeypatch) -> None:
    def fail(*_: object) -> None:
        pytest.fail("the kernel ran")

    monkeypatch.setattr(norms._KERNEL, "run", fail)
    x, layer, rows = made(2, 24, 5, 3), GroupNorm(4, 24), LayerNorm(3)
    assert torch.equal(layer(x), F.group_norm(x, 4, layer.weight, layer.bias))
    for each in (x.float().requires_grad_(), x[:0].detach().requires_grad_()):
        assert rows(layer(each)).shape == each.shape
    with torch.no_grad():
        layer(x.requires_grad_())
