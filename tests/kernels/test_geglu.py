"""The kernel of GEGLU against float64, beside torch's operations in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.there_and_back import ROUNDING, assert_near, there_and_back
from torch import Tensor

from gobelin.kernels import geglu as kernel
from gobelin.operations import geglu

pytestmark = pytest.mark.skipif(not kernel.has_geglu(), reason="needs a C++ compiler and a CPU with AVX512-BF16")


def plain(both: Tensor) -> Tensor:
    hidden, gate = both.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 74), (64, 768), (2, 129, 34)], ids=str)
def test_it_is_as_near_to_float64_as_torchs(shape) -> None:
    assert_near(geglu, (2 * torch.randn(shape)).bfloat16(), plain)


def test_every_gate_in_bfloat16_is_right_to_rounding() -> None:
    gates = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gates = gates[gates.isfinite()]
    both = torch.stack([torch.ones_like(gates), gates], dim=1)
    out, grads = there_and_back(geglu, both)
    truth, true_grads = there_and_back(plain, both, torch.float64)
    for mine, exact, zero in ((out, truth, 1e-15), (grads, true_grads, 1e-6)):
        near = (mine.double() - exact).abs() <= ROUNDING * exact.abs() + zero
        assert (near | (exact.abs() > 3e38)).all()


def test_infinities_and_nan_are_torchs() -> None:
    both = torch.tensor([[1, torch.inf], [1, -torch.inf], [torch.nan, 1], [1, torch.nan], [torch.inf, 1]]).bfloat16()
    for mine, theirs in zip(there_and_back(geglu, both), there_and_back(plain, both), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.isinf(), theirs.isinf())


def test_any_strides_will_do() -> None:
    wide = torch.randn(6, 8, 20).bfloat16()
    for x in (wide.transpose(0, 1), wide[::2, :, ::2], wide[:1].expand(3, -1, -1)):
        assert all(
            torch.equal(one, other)
            for one, other in zip(there_and_back(geglu, x), there_and_back(geglu, x.clone()), strict=True)
        )


def test_the_operator_is_what_torch_expects_of_operators() -> None:
    torch.library.opcheck(kernel._geglu, (torch.randn(3, 10).bfloat16().requires_grad_(),))


def test_what_does_not_fit_is_refused() -> None:
    for bad in (torch.ones(2, 4), torch.ones(2, 3).bfloat16(), torch.ones(0, 4).bfloat16()):
        with pytest.raises(ValueError, match="give bfloat16"):
            kernel._geglu(bad)


def test_second_derivatives_are_refused() -> None:
    both = torch.randn(3, 10).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(geglu(both).float().square().sum(), both, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.float().sum(), both)
