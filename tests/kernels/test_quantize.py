"""The kernel that rounds activations to 8 bits: against its equations in torch, and its properties."""

import math

import pytest
import torch
from torch import Tensor

from gobelin.kernels import quantize as kernel
from gobelin.kernels.quantize import QuantizedSamples, by_torch, quantize_samples

SHAPES = [(1, 1), (2, 37), (3, 5, 16), (2, 4096, 40), (1, (1 << 15) + 1)]
NUMBERS = {
    "normal": torch.randn,
    "never below zero": torch.rand,
    "never above zero": lambda shape: -torch.rand(shape),
    "all the same": lambda shape: torch.full(shape, 3.0),
    "large": lambda shape: 1e30 * torch.randn(shape),
    "small": lambda shape: 1e-30 * torch.randn(shape),
}


def restored(rounded: QuantizedSamples) -> Tensor:
    shape = (-1, *[1] * (rounded.values.ndim - 1))
    scales, zero_points = torch.tensor(rounded.scales).view(shape), torch.tensor(rounded.zero_points).view(shape)
    return (rounded.values.double() - zero_points) * scales


@pytest.mark.parametrize("round_numbers", [quantize_samples, by_torch])
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_are_the_nearest_of_256_between_the_extremes(round_numbers, numbers, shape) -> None:
    given = numbers(shape).bfloat16()
    rounded = round_numbers(given)
    scales = torch.tensor(rounded.scales, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    span = given.flatten(1).double()
    span = span.amax(1).clamp(min=0) - span.amin(1).clamp(max=0)
    assert torch.allclose(scales.flatten(), span / 255, rtol=1e-6, atol=0)
    assert rounded.values.shape == given.shape
    # Half of a step; where the zero point was rounded, an extreme may lie half a step further out.
    assert ((restored(rounded) - given.double()).abs() <= 1.001 * scales).all()
    inside = (rounded.values > 0) & (rounded.values < 255)
    assert ((restored(rounded) - given.double()).abs() <= 0.501 * scales)[inside].all()


def test_zero_is_exact() -> None:
    given = torch.randn(4, 100).bfloat16()
    given[:, 7] = 0
    assert (restored(quantize_samples(given))[:, 7] == 0).all()
    nothing = quantize_samples(torch.zeros(2, 5).bfloat16())
    assert (restored(nothing) == 0).all()


def test_a_sample_does_not_depend_on_another() -> None:
    given = torch.randn(3, 9, 20).bfloat16() * torch.tensor([1, 100, 0.01]).view(3, 1, 1).bfloat16()
    together = quantize_samples(given)
    for i, one in enumerate(given):
        alone = quantize_samples(one[None])
        assert torch.equal(together.values[i], alone.values[0])
        assert (together.scales[i], together.zero_points[i]) == (alone.scales[0], alone.zero_points[0])


def test_threads_and_strides_change_nothing() -> None:
    given = torch.randn(2, 700, 90).bfloat16().transpose(1, 2)
    before, threads = quantize_samples(given), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        after = quantize_samples(given.contiguous())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(before.values, after.values)
    assert before[1:] == after[1:]


@pytest.mark.parametrize("round_numbers", [quantize_samples, by_torch])
def test_what_is_no_number_is_not_hidden(round_numbers) -> None:
    rounded = round_numbers(
        torch.tensor([[1, torch.nan, 2], [1, torch.inf, 2], [1, -torch.inf, 2], [1, 2, 3]]).bfloat16()
    )
    assert [math.isfinite(scale) for scale in rounded.scales] == [False, False, False, True]


def test_without_a_kernel_it_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.randn(2, 50).bfloat16()
    monkeypatch.setattr(kernel, "has_quantize", lambda: False)
    mine, theirs = quantize_samples(given), by_torch(given)
    assert torch.equal(mine.values, theirs.values)
    assert mine[1:] == theirs[1:]
