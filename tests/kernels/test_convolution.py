"""The kernel of convolutions against float64, beside torch's own in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.test_fused_attention import run
from tests.kernels.there_and_back import ROUNDING
from torch import Tensor

from gobelin.kernels import convolution as kernel
from gobelin.operations import Conv2d

pytestmark = pytest.mark.skipif(not kernel.has_convolution(), reason="needs a C++ compiler and a CPU with AMX")

SHAPES = [  # batch, inputs, outputs, height, width
    *((64, 4, 48, 16, 16), (3, 48, 96, 8, 8), (5, 144, 144, 4, 4), (2, 33, 50, 7, 9), (1, 1, 1, 1, 1)),
    *((1, 20, 17, 40, 50), (1, 3, 2, 1100, 3), (2, 2, 5, 3, 1100), (3, 97, 16, 1, 5), (2, 16, 130, 5, 1)),
    *((51, 5, 7, 6, 6), (1, 40, 33, 50, 61)),
]


def made(batch: int, inputs: int, outputs: int, height: int, width: int) -> list[Tensor]:
    """Input, weight, bias, and the gradient of the result."""
    weight = torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5
    grad = torch.randn(batch, outputs, height, width).bfloat16()
    return [torch.randn(batch, inputs, height, width).bfloat16(), weight, torch.randn(outputs), grad]


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernel.fused_convolution(x, weight, bias)


def there_and_back(convolve, inputs: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of input, weight and bias."""
    *trained, grad = (each.detach() for each in inputs)
    trained = [each.requires_grad_() for each in trained]
    out = convolve(*trained)
    return [out.detach(), *torch.autograd.grad(out, trained, grad)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients_are_no_farther_from_float64_than_torchs(shape) -> None:
    inputs = made(*shape)
    exact = there_and_back(plain, [each.double() for each in inputs])
    for mine, theirs, truth in zip(there_and_back(ours, inputs), there_and_back(plain, inputs), exact, strict=True):
        assert mine.shape == truth.shape
        distance = (mine.double() - truth).norm()
        assert distance <= ROUNDING * truth.norm() + 1e-6
        assert distance <= 1.1 * (theirs.double() - truth).norm() + 1e-5 * truth.norm() + 1e-6


def test_whole_numbers_are_exact() -> None:
    """Every number goes where it belongs: small integers have no rounding."""
    for shape in SHAPES:
        inputs = [torch.randint(-2, 3, each.shape).to(each.dtype) for each in made(*shape)]
        exact = there_and_back(plain, [each.double() for each in inputs])
        for mine, truth in zip(there_and_back(ours, inputs), exact, strict=True):
            assert torch.equal(mine, truth.to(mine.dtype))


def test_any_strides_will_do_and_results_lie_channels_last() -> None:
    x, weight, bias, grad = made(2, 10, 12, 6, 7)
    strided = [
        torch.stack([x, x], dim=-1)[..., 0],
        weight.to(memory_format=torch.channels_last),
        torch.stack([bias, bias], dim=1)[:, 0],
        grad.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    same = there_and_back(ours, [x, weight, bias, grad])
    assert all(torch.equal(one, other) for one, other in zip(there_and_back(ours, strided), same, strict=True))
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in same[:2])


def test_nan_reaches_all_that_depends_on_it_and_no_other_sample() -> None:
    x, weight, bias, grad = made(3, 16, 16, 9, 9)
    x[1, 7, 4, 4] = torch.nan
    out, dx, dweight, _ = there_and_back(ours, [x, weight, bias, grad])
    exact = there_and_back(plain, [each.double() for each in (x, weight, bias, grad)])
    assert out.isnan()[exact[0].isnan()].all()
    assert not out[::2].isnan().any()
    assert not out[1, :, :3].isnan().any()
    assert not dx.isnan().any()
    assert torch.equal(dweight.isnan(), exact[2].isnan())
    grad[1, 3, 0, 0] = torch.inf
    assert not there_and_back(ours, [torch.ones_like(x), weight, bias, grad])[1].isfinite()[1, :, 0, 0].any()


def test_bits_do_not_depend_on_threads_and_samples_not_on_their_neighbours() -> None:
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        runs.append([each for shape in SHAPES[1:6] for each in there_and_back(ours, made_again(*shape))])
    torch.set_num_threads(before)
    for one in runs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(one, runs[0], strict=True))
    inputs = made(7, 20, 20, 9, 9)
    whole = there_and_back(ours, inputs)
    alone = there_and_back(ours, [inputs[0][4:5], *inputs[1:3], inputs[3][4:5]])
    assert all(torch.equal(one[4:5], other) for one, other in zip(whole[:2], alone[:2], strict=True))


def made_again(*shape: int) -> list[Tensor]:
    torch.manual_seed(0)
    return made(*shape)


@pytest.mark.parametrize("trained", ["input", "weight", "bias"])
def test_what_is_frozen_has_no_gradient(trained) -> None:
    inputs = dict(zip(("input", "weight", "bias", "grad"), made(2, 10, 12, 6, 7), strict=True))
    grad = inputs.pop("grad")
    inputs[trained].requires_grad_()
    kernel.fused_convolution(*inputs.values()).backward(grad)
    assert [name for name, each in inputs.items() if each.grad is not None] == [trained]


def test_the_operators_are_what_torch_expects_of_operators() -> None:
    x, weight, bias, _ = (each.requires_grad_() for each in made(2, 10, 12, 6, 7))
    torch.library.opcheck(kernel._convolution, (x, weight, bias))
    torch.library.opcheck(kernel._convolution, (x, weight, None))


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias, _ = made(2, 10, 12, 6, 7)
    bad = [(x.float(), weight, bias), (x[:0], weight, bias), (x[:, 1:], weight, bias), (x, weight.bfloat16(), bias)]
    for one in [*bad, (x, weight, bias[1:]), (x, weight[..., :2], bias), (x[0], weight, bias)]:
        assert not kernel.takes_convolution(*one)
        with pytest.raises(ValueError, match="give bfloat16"):
            kernel._convolution(*one)


def test_second_derivatives_are_refused() -> None:
    x, weight, bias, _ = (each.requires_grad_() for each in made(2, 10, 12, 6, 7))
    (dx,) = torch.autograd.grad(kernel.fused_convolution(x, weight, bias).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.float().sum(), x)


@pytest.mark.parametrize("options", [{"padding": 1}, {"kernel_size": 1}, {"padding": 1, "bias": False}], ids=str)
def test_a_layer_under_autocast_learns_as_torchs(options) -> None:
    layer = Conv2d(10, 12, **{"kernel_size": 3, **options})
    x = torch.randn(2, 10, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out, other = layer(x), torch.nn.Conv2d.forward(layer, x)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out, other, atol=0.05, rtol=0.02)
    parameters = list(layer.parameters())
    for one, two in zip(
        torch.autograd.grad(out.float().square().sum(), parameters),
        torch.autograd.grad(other.float().square().sum(), parameters),
        strict=True,
    ):
        assert (one - two).norm() <= 0.02 * two.norm()


def test_only_what_trains_in_bfloat16_and_keeps_its_size_goes_through_the_kernel(monkeypatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(kernel._KERNEL, "run", lambda function, problem: calls.append(function))
    x = torch.randn(2, 8, 6, 6)
    Conv2d(8, 8, 3, padding=1)(x)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            Conv2d(8, 8, 3, padding=1)(x)
        for options in ({}, {"padding": 1, "stride": 2}, {"padding": 1, "groups": 2}, {"padding": 2, "dilation": 2}):
            Conv2d(8, 8, 3, **options)(x)
        assert calls == []
        Conv2d(8, 8, 3, padding=1)(x)
    assert calls == ["convolution_forward"]


# Not in this process: the checks of types are nothing that could be compiled.
COMPILED = """
import torch
from torch import Tensor
from gobelin.layers import ResnetBlock2D

def gradients(call, layer):
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(torch.randn(2, 8, 6, 5), torch.randn(2, 10))
    return list(torch.autograd.grad(out.float().square().sum(), list(layer.parameters())))

layer = ResnetBlock2D(8, 12, groups=2, eps=1e-5, time_width=10)
compiled = gradients(torch.compile(layer, backend="aot_eager", fullgraph=True), layer)
assert all(torch.equal(one, other) for one, other in zip(compiled, gradients(layer, layer), strict=True))
"""


def test_a_block_that_is_compiled_learns_the_same() -> None:
    run(COMPILED)
