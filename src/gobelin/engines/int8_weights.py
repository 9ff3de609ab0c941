"""Weights and activations as whole numbers of 8 bits, which a CPU with VNNI multiplies twice as fast as bfloat16.

A weight has a scale for each output channel (symmetric, packed once), an activation one for each sample, and a zero
point, of its own numbers in every call: nothing is calibrated. The sums are exact; the result is bfloat16.
"""

from fnmatch import fnmatchcase
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gobelin.engines.packed_weights import LayerForward, PackableLayer, pack_in_bfloat16, pack_pointwise
from gobelin.kernels.hardware import has_instructions
from gobelin.kernels.quantize import quantize_samples
from gobelin.operations import Conv2d

SENSITIVE = ("conv_in", "conv_out", "time_embedding.*", "*.time_emb_proj", "*.conv_shortcut", "*.attn2.to_[kv]")
"""The U-Net's layers that stay in bfloat16: what enters and leaves it, the timestep, the words, and shortcuts.

A shortcut's input is the sum of all that came before it, with a few large channels. The others take no time.
"""


def can_multiply_int8() -> bool:
    """Tell whether the CPU multiplies whole numbers of 8 bits in hardware (VNNI), and oneDNN is there to do it."""
    return torch.backends.mkldnn.is_available() and has_instructions("avx512_vnni")


def pack_in_int8(name: str, layer: PackableLayer) -> LayerForward:
    """Pack a layer's weight in int8, or in bfloat16 where it is sensitive."""
    if any(fnmatchcase(name, pattern) for pattern in SENSITIVE) or not _can_be_product(layer):
        return pack_pointwise(layer) if _is_pointwise(layer) else pack_in_bfloat16(name, layer)
    if isinstance(layer, nn.Linear):
        product = _Int8Product(layer.weight, layer)

        def multiply(hidden: Tensor) -> Tensor:
            if torch.is_grad_enabled() or hidden.dtype != torch.bfloat16 or hidden.ndim < 3:
                return type(layer).forward(layer, hidden)
            return product(*quantize_samples(hidden.flatten(1, -2))).view(*hidden.shape[:-1], -1)

        return multiply
    # [out, in, rows, columns] in the order in which a window of a feature map that is channels last lies in memory
    product = _Int8Product(layer.weight.permute(0, 2, 3, 1).flatten(1), layer)

    def convolve(hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled() or hidden.dtype != torch.bfloat16 or hidden.ndim != 4:
            return type(layer).forward(layer, hidden)
        values, scales, zero_points = quantize_samples(hidden.permute(0, 2, 3, 1))
        windows, height, width = _windows(values, zero_points, layer)
        return product(windows, scales, zero_points).view(len(hidden), height, width, -1).permute(0, 3, 1, 2)

    return convolve


class _Int8Product:
    """The product with a weight [out, in]: of rows of whole numbers, sample by sample, as each has a scale."""

    def __init__(self, weight: Tensor, layer: PackableLayer):
        weight = weight.detach().float()
        self._scales = weight.abs().amax(1).div(127).clamp_(min=torch.finfo(torch.float32).tiny)
        whole = (weight / self._scales[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(whole, None)
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)
        self._layer = layer

    def __call__(self, values: Tensor, scales: list[float], zero_points: list[int]) -> Tensor:
        bias = None if self._layer.bias is None else self._layer.bias.float()
        out = [
            torch.ops.onednn.qlinear_pointwise(
                *(rows, scale, zero_point, self._packed, self._scales, self._zero_points, bias),
                *(1.0, 0, torch.bfloat16, "none", [], ""),
            )
            for rows, scale, zero_point in zip(values, scales, zero_points, strict=True)
        ]
        return out[0][None] if len(out) == 1 else torch.stack(out)


def _can_be_product(layer: PackableLayer) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    return (layer.groups, layer.dilation) == (1, (1, 1)) and not isinstance(layer.padding, str)


def _is_pointwise(layer: PackableLayer) -> TypeGuard[nn.Conv2d]:
    """Tell whether a layer is a 1×1 convolution that looks at every position, and nothing else."""
    if not isinstance(layer, nn.Conv2d):
        return False
    return (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _windows(values: Tensor, zero_points: list[int], layer: nn.Conv2d) -> tuple[Tensor, int, int]:
    """Unfold maps [batch, height, width, in] to the windows of a convolution, [batch, positions, rows · columns · in].

    Returns them, and the height and width of the result.
    """
    (rows, columns), (down, right) = layer.kernel_size, layer.stride
    above, left = (int(size) for size in layer.padding)
    batch, height, width, channels = values.shape
    if above or left:
        padded = values.new_empty(batch, height + 2 * above, width + 2 * left, channels)
        for sample, zero_point in zip(padded, zero_points, strict=True):
            sample.fill_(zero_point)
        padded[:, above : above + height, left : left + width] = values
        values = padded
    values = values.unfold(1, rows, down).unfold(2, columns, right)  # [batch, height, width, in, rows, columns]
    height, width = values.shape[1:3]
    return values.permute(0, 1, 2, 4, 5, 3).reshape(batch, height * width, -1), height, width
