"""Upsampling as four phases: the same numbers as interpolation and convolution, up to rounding."""

import pytest
import torch
from torch import Tensor, nn

from gobelin.engines.packed_weights import PackedWeights
from gobelin.engines.phase_convolutions import phase_weights
from gobelin.kernels.hardware import has_bfloat16
from gobelin.layers import Upsample2D

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")

DTYPES = [torch.float32] + [torch.bfloat16] * has_bfloat16(torch.device("cpu"))
DTYPE = DTYPES[-1]


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def upsampled(block: Upsample2D, given: Tensor, *size: tuple[int, int]) -> Tensor:
    weights = PackedWeights(nn.Sequential(block))
    weights.update()
    with weights.in_use():
        return block(given, *size)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "channels", "height", "width"), [(1, 8, 1, 1), (2, 5, 3, 7), (3, 48, 8, 5)])
@pytest.mark.parametrize("last", [False, True])
def test_it_computes_what_the_block_does(
    dtype: torch.dtype, batch: int, channels: int, height: int, width: int, last: bool
) -> None:
    block = Upsample2D(channels).to(dtype).requires_grad_(False)
    given = torch.randn(batch, channels, height, width).to(dtype)
    given = given.contiguous(memory_format=torch.channels_last) if last else given
    ours, plain = upsampled(block, given), block(given)
    assert ours.shape == plain.shape == (batch, channels, 2 * height, 2 * width)
    assert ours.dtype == dtype
    assert not torch.equal(ours, plain) or ours.numel() < 100
    truth = block.double()(given.double())
    assert error(ours, truth) <= 3 * error(plain, truth) + 1e-6
    assert torch.equal(upsampled(block.to(dtype), given, (2 * height, 2 * width)), ours)


@torch.no_grad()
def test_another_size_is_the_blocks_own() -> None:
    block, given = Upsample2D(6).to(DTYPE).requires_grad_(False), torch.randn(1, 6, 4, 5).to(DTYPE)
    assert error(upsampled(block, given, (7, 9)), block(given, (7, 9))) <= 0.01
    assert upsampled(block, given, (7, 9)).shape == (1, 6, 7, 9)


def test_every_weight_is_counted_once_in_each_phase() -> None:
    weight = torch.randn(3, 2, 3, 3)
    phases = phase_weights(weight).view(4, 3, 2, 2, 2)
    assert torch.allclose(phases.sum(dim=(3, 4)), weight.sum(dim=(2, 3)).expand(4, -1, -1), atol=1e-6)
    assert torch.equal(phases[0, :, :, 0, 0], weight[:, :, 0, 0])
    assert torch.equal(phases[3, :, :, 1, 1], weight[:, :, 2, 2])


def test_a_convolution_that_is_listened_to_is_called() -> None:
    block, heard = Upsample2D(4).to(DTYPE).requires_grad_(False), []
    block.conv.register_forward_hook(lambda *_: heard.append(1))
    with torch.no_grad():
        upsampled(block, torch.randn(1, 4, 3, 3).to(DTYPE))
    assert heard == [1]
