"""Unfolded convolutions: the same numbers as PyTorch's own, up to rounding, and only where maps are small."""

import pytest
import torch
from torch import Tensor, nn

from gobelin.engines import unfolded_convolutions as kernel
from gobelin.engines.forwards import other_forwards
from gobelin.engines.unfolded_convolutions import unfolded, unfolded_forwards
from gobelin.operations import Conv2d

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a PyTorch with MKL")

CONVOLUTIONS = [
    nn.Conv2d(5, 7, 3, padding=1),
    nn.Conv2d(6, 6, 3, stride=2, padding=1),
    nn.Conv2d(6, 4, (3, 1), stride=(1, 2), padding=(2, 0), bias=False),
    nn.Conv2d(4, 9, (2, 5), padding=(0, 3)),
]


@pytest.fixture
def narrow_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfold convolutions of any width."""
    monkeypatch.setattr(kernel, "_WIDE", 1)


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_convolution_computes_the_same(layer: nn.Conv2d, last: bool, batch: int) -> None:
    given = torch.randn(batch, layer.in_channels, 9, 11)
    given = given.contiguous(memory_format=torch.channels_last) if last else given
    ours, truth = unfolded(given, layer), layer.double()(given.double())
    layer.float()
    assert ours.shape == truth.shape
    assert ours.is_contiguous()
    assert error(ours, truth) <= 3e-7


@pytest.mark.usefixtures("narrow_ones_too")
@pytest.mark.parametrize(("batch", "height", "products"), [(1, 16, 1), (2, 16, 1), (2, 17, 0), (3, 16, 0), (4, 8, 1)])
def test_maps_that_are_small_are_unfolded(
    monkeypatch: pytest.MonkeyPatch, batch: int, height: int, products: int
) -> None:
    calls = []
    monkeypatch.setattr(kernel, "unfolded", lambda *given: calls.append(given) or unfolded(*given))
    layer = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
    given = torch.randn(batch, 4, height, 16)
    with torch.no_grad(), other_forwards(unfolded_forwards(layer)):
        ours = layer(given)
    assert len(calls) == products
    assert torch.allclose(ours, layer(given), atol=1e-6)


@pytest.mark.usefixtures("narrow_ones_too")
def test_what_is_something_else_stays_as_it_is() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, given: Tensor) -> Tensor:
            return 2 * super().forward(given)

    others = [
        nn.Linear(4, 4),
        Doubled(4, 4, 3),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3).bfloat16(),
        nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        nn.Conv2d(4, 4, 3, device="meta"),
    ]
    assert unfolded_forwards(nn.Sequential(*others)) == {}
    assert len(unfolded_forwards(nn.Sequential(nn.Conv2d(4, 4, 3), Conv2d(4, 4, 3)))) == 2


def test_narrow_ones_stay_as_they_are() -> None:
    wide = nn.Conv2d(640, 640, 3)
    network = nn.Sequential(nn.Conv2d(639, 640, 3), wide, nn.Conv2d(640, 639, 3))
    assert list(unfolded_forwards(network)) == [wide]


@pytest.mark.usefixtures("narrow_ones_too")
def test_gradients_other_precisions_and_errors_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "unfolded", None)  # which cannot be called
    layer = nn.Sequential(nn.Conv2d(4, 6, 3))
    given = torch.randn(1, 4, 9, 9)
    with other_forwards(unfolded_forwards(layer)):
        torch.autograd.grad(layer(given).sum(), layer[0].weight)
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(given).dtype == torch.bfloat16
            assert layer(given[0]).shape == (6, 7, 7)
            for wrong in (given[:, 1:], given[..., :2], given.double()):
                with pytest.raises(RuntimeError):
                    layer(wrong)


@pytest.mark.usefixtures("narrow_ones_too")
@torch.no_grad()
def test_a_weight_that_is_written_to_is_used_at_once() -> None:
    layer = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False))
    given = torch.randn(1, 4, 9, 9)
    forwards = unfolded_forwards(layer)
    before = layer(given)
    layer[0].weight.data.mul_(2)
    with other_forwards(forwards):
        assert torch.allclose(layer(given), 2 * before, atol=1e-5)
