"""Frozen weights of a training step, made ready once and not in every step: rounded, and packed for small maps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gobelin.engines.forwards import is_replaced, other_forwards
from gobelin.engines.packed_convolution import PackedConvolution
from gobelin.engines.packed_weights import has_room_for
from gobelin.operations import Conv2d
from gobelin.training.config import Precision
from gobelin.training.precision import computes_in

_SIZES = ((1, 1), (1, 1), (1, 1), 1)  # padding, stride, dilation and groups of what is packed
_FEW_PIXELS = 512  # of a batch's maps; with more, a convolution takes longer than to put its weight in order


class FrozenWeights:
    """Frozen weights of linear layers and convolutions, as a step in ``precision`` computes with them.

    Where that is bfloat16 they are rounded once, as autocast rounds them in every step. On a CPU, 3×3 convolutions of
    maps of few pixels have their weights packed, too: of a LoRA's step at 32×32 latents most of the time went into
    putting the weights of Stable Diffusion's deep levels in oneDNN's order, twice. Where memory is short they are not.
    Weights that are trained are left alone.
    """

    def __init__(self, module: nn.Module, device: torch.device, precision: Precision):
        dtype = computes_in(device, precision)
        self._convolutions: dict[nn.Module, _FrozenConvolution] = {}
        can_pack = device.type == "cpu" and torch.backends.mkldnn.is_available() and not _is_compiled(module)
        if can_pack and has_room_for(module):
            self._convolutions = {
                layer: _FrozenConvolution(layer, dtype) for layer in module.modules() if _can_pack(layer)
            }
        self._rounded: list[tuple[Tensor, Tensor]] = []
        if dtype == torch.bfloat16:
            frozen = {
                id(parameter): parameter
                for layer in module.modules()
                if isinstance(layer, nn.Linear | nn.Conv2d)
                for parameter in (None if layer in self._convolutions else layer.weight, layer.bias)
                if parameter is not None and not parameter.requires_grad
            }
            self._rounded = [(one, _round(one.detach(), dtype)) for one in frozen.values()]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Compute with them while the block runs, which takes the forward pass and its backward pass."""
        whole = [parameter.data for parameter, _ in self._rounded]
        try:
            for parameter, rounded in self._rounded:
                parameter.data = rounded
            with other_forwards(self._convolutions):
                yield
        finally:
            for (parameter, _), data in zip(self._rounded, whole, strict=True):
                parameter.data = data


class _FrozenConvolution:
    """A 3×3 convolution by a frozen weight, which is packed for maps of few pixels, and rounded for others."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype):
        self._layer = layer
        self._dtype = dtype
        self._rounded: Tensor | None = None
        self._forward = PackedConvolution(self._weight, *_SIZES)
        # The gradient of a convolution's input is the gradient convolved by the mirrored weight, inputs and outputs
        # exchanged (Dumoulin and Visin, arXiv 1603.07285, relationship 8).
        self._backward = PackedConvolution(lambda: self._weight().flip(2, 3).transpose(0, 1), *_SIZES)

    def __call__(self, hidden: Float[Tensor, "batch in height width"]) -> Float[Tensor, "batch out height width"]:
        hidden = hidden.to(self._dtype)
        if len(hidden) * hidden.shape[-1] * hidden.shape[-2] <= _FEW_PIXELS:
            bias = self._layer.bias
            return _Convolve.apply(
                hidden, None if bias is None else bias.to(self._dtype), self._forward, self._backward
            )
        if self._rounded is None:
            self._rounded = _round(self._layer.weight.detach(), self._dtype)
        return F.conv2d(hidden, self._rounded, self._layer.bias, padding=1)

    def _weight(self) -> Tensor:
        return self._layer.weight.detach().to(self._dtype)


class _Convolve(torch.autograd.Function):
    """A convolution by packed weights, one for each direction; the bias is frozen, too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, bias: Tensor | None, forward: PackedConvolution, backward: PackedConvolution
    ) -> Tensor:
        ctx.packed = backward
        return forward(hidden, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient,) = gradients
        return ctx.packed(gradient.contiguous(memory_format=torch.channels_last), None), None, None, None


def _can_pack(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Tell whether a layer is a plain 3×3 convolution, of an output a pixel, that nothing trains or replaces."""
    return (
        type(layer) in (nn.Conv2d, Conv2d)
        and layer.kernel_size == (3, 3)
        and (layer.padding, layer.stride, layer.dilation, layer.groups) == _SIZES
        and layer.padding_mode == "zeros"
        and not any(parameter.requires_grad for parameter in layer.parameters())
        and not is_replaced(layer)
    )


def _is_compiled(module: nn.Module) -> bool:
    """Tell whether ``torch.compile`` makes the module's forward pass: it packs what it wants packed."""
    return module._compiled_call_impl is not None


def _round(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a weight; a kernel lies channels last, as hidden states do, or it is copied in every pass."""
    if weight.ndim == 4:
        return weight.to(dtype, memory_format=torch.channels_last)
    return weight.to(dtype)
