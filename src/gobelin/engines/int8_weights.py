"""Weights and activations as whole numbers of 8 bits, which a CPU with VNNI multiplies twice as fast as bfloat16.

A weight has a scale for each output channel, symmetric, and is packed once. An activation has one for each sample, and
a zero point, by its own numbers in every call: nothing is calibrated, and no image depends on its neighbours. Sums are
exact, and what comes out is bfloat16.
"""

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from gobelin.engines.packed_weights import LayerForward, PackableLayer, pack_as_it_is
from gobelin.kernels.hardware import has_bfloat16, has_instructions
from gobelin.kernels.quantize import QuantizedSamples, quantize_samples

SENSITIVE = ("conv_in", "conv_out", "time_embedding.*", "*.time_emb_proj", "*.conv_shortcut", "*.attn2.to_[kv]")
"""The U-Net's layers that stay in bfloat16: what enters and leaves it, the timestep, the words, and shortcuts.

A shortcut's input is no norm's output but the sum of all that came before, a few channels of which are large. Together
they are 3 % of the arithmetic.
"""


def can_multiply_int8() -> bool:
    """Tell whether the CPU multiplies both int8 (VNNI) and bfloat16, and PyTorch has oneDNN's operators for it."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.onednn, "qlinear_prepack")
        and has_instructions("avx512_vnni")
        and has_bfloat16(torch.device("cpu"))
    )


def pack_in_int8(name: str, layer: PackableLayer) -> LayerForward:
    """Pack the weight of a layer of a U-Net in int8, or in bfloat16 if it is among the ``SENSITIVE``."""
    if any(fnmatchcase(name, pattern) for pattern in SENSITIVE):
        return pack_as_it_is(name, layer)
    if isinstance(layer, nn.Linear):
        return _packed_linear(layer)
    return _packed_convolution(layer) if _can_unfold(layer) else pack_as_it_is(name, layer)


def _packed_linear(layer: nn.Linear) -> LayerForward:
    product = _Int8Product(layer, layer.weight)

    def multiply(hidden: Tensor) -> Tensor:
        rows = hidden.reshape(len(hidden), -1, hidden.shape[-1])
        return product(quantize_samples(rows)).view(*hidden.shape[:-1], -1)

    return multiply


def _packed_convolution(layer: nn.Conv2d) -> LayerForward:
    # In the order in which a window of a feature map lies in memory whose channels are last: rows, columns, channels.
    product = _Int8Product(layer, layer.weight.permute(0, 2, 3, 1))

    def convolve(hidden: Tensor) -> Tensor:
        windows = _windows(quantize_samples(hidden.permute(0, 2, 3, 1)), layer)
        return product(windows).unflatten(1, _size_after(hidden, layer)).permute(0, 3, 1, 2)

    return convolve


class _Int8Product:
    """The product of rows of whole numbers with a layer's weight [out, ...], sample by sample, as each has a scale."""

    def __init__(self, layer: PackableLayer, weight: Tensor):
        weight = weight.detach().flatten(1).float()
        lowest, highest = torch.aminmax(weight, dim=1)
        self._layer = layer
        self._scales = torch.maximum(-lowest, highest).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)
        whole = weight.div_(self._scales[:, None]).round_().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(whole, None)

    def __call__(self, given: QuantizedSamples) -> Tensor:
        """Multiply [samples, rows, in]; returns [samples, rows, out] in bfloat16."""
        bias = None if self._layer.bias is None else self._layer.bias.float()
        weight = self._packed, self._scales, self._zero_points, bias
        as_bfloat16 = 1.0, 0, torch.bfloat16, "none", [], ""
        out = [
            torch.ops.onednn.qlinear_pointwise(rows, scale, zero_point, *weight, *as_bfloat16)
            for rows, scale, zero_point in zip(*given, strict=True)
        ]
        return out[0][None] if len(out) == 1 else torch.stack(out)


def _can_unfold(layer: nn.Conv2d) -> bool:
    return (layer.groups, layer.dilation) == (1, (1, 1)) and not isinstance(layer.padding, str)


def _windows(maps: QuantizedSamples, layer: nn.Conv2d) -> QuantizedSamples:
    """Unfold maps [batch, height, width, in] to a convolution's windows, [batch, positions, rows · columns · in]."""
    values, scales, zero_points = maps
    (rows, columns), (down, right), (above, left) = layer.kernel_size, layer.stride, _padding(layer)
    batch, height, width, channels = values.shape
    if above or left:
        padded = values.new_empty(batch, height + 2 * above, width + 2 * left, channels)
        for sample, zero_point in zip(padded, zero_points, strict=True):
            sample.fill_(zero_point)  # which is what 0 has become
        padded[:, above : above + height, left : left + width] = values
        values = padded
    windows = values.unfold(1, rows, down).unfold(2, columns, right).permute(0, 1, 2, 4, 5, 3)
    return QuantizedSamples(windows.flatten(3).flatten(1, 2), scales, zero_points)


def _size_after(hidden: Tensor, layer: nn.Conv2d) -> tuple[int, int]:
    """Compute the height and width of a convolution's result."""
    sizes = zip(hidden.shape[2:], _padding(layer), layer.kernel_size, layer.stride, strict=True)
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size, padding, kernel, stride in sizes)
    return height, width


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    above, left = (int(size) for size in layer.padding)
    return above, left
