"""Convolutions of small feature maps in float32 as one matrix product, of the weights as they are and the map unfolded.

oneDNN puts a convolution's weights into an order of its own at every call. Where there are many weights and few
positions to multiply them with, that takes longer than the products.
"""

from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gobelin.operations import Conv2d

_WIDE = 640  # channels, of the map and of the result: with fewer, there are too few weights for their order to matter
_POSITIONS = 512  # of all results of a batch: with more, oneDNN's convolution is as fast, and the unfolded map is large


def unfolded_forwards(network: nn.Module) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """List a network's convolutions that may pay as products, each with a forward that decides by the size of the map.

    They are wide, in float32, on a CPU for which PyTorch has Intel's MKL; parameters stay as they are. Only plain
    ones are among them: what computes in another way, as an adapter does, goes on doing so.
    """
    if not torch.backends.mkl.is_available():
        return {}
    return {layer: _unfolding(layer) for layer in network.modules() if _can_unfold(layer)}


def unfolded(hidden: Tensor, layer: nn.Conv2d) -> Tensor:
    """Convolve by one product, weights [out, in · window] by the unfolded map [in · window, batch · rows · columns]."""
    rows, columns = layer.kernel_size
    above, left = (int(size) for size in layer.padding)
    windows = F.pad(hidden, (left, left, above, above))
    windows = windows.unfold(2, rows, layer.stride[0]).unfold(3, columns, layer.stride[1])
    batch, _, height, width = windows.shape[:4]
    matrix = windows.permute(1, 4, 5, 0, 2, 3).reshape(-1, batch * height * width)
    weight = layer.weight.flatten(1)
    out = weight @ matrix if layer.bias is None else torch.addmm(layer.bias[:, None], weight, matrix)
    return out.view(-1, batch, height, width).transpose(0, 1).contiguous()


def _can_unfold(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer) in (nn.Conv2d, Conv2d)
        and (layer.padding_mode, layer.groups, layer.dilation) == ("zeros", 1, (1, 1))
        and not isinstance(layer.padding, str)
        and layer.kernel_size != (1, 1)
        and min(layer.in_channels, layer.out_channels) >= _WIDE
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and layer.weight.is_contiguous()
    )


def _unfolding(layer: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    def convolve(hidden: Tensor) -> Tensor:
        return unfolded(hidden, layer) if _is_small(hidden, layer) else type(layer).forward(layer, hidden)

    return convolve


def _is_small(hidden: Tensor, layer: nn.Conv2d) -> bool:
    """Tell whether a map has so few positions that the product is faster, and nothing else is asked of the layer."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if hidden.ndim != 4 or hidden.dtype != torch.float32 or hidden.shape[1] != layer.in_channels:
        return False
    (rows, columns), (down, right) = layer.kernel_size, layer.stride
    above, left = (int(size) for size in layer.padding)
    height = (hidden.shape[2] + 2 * above - rows) // down + 1
    width = (hidden.shape[3] + 2 * left - columns) // right + 1
    return height > 0 and width > 0 and 0 < len(hidden) * height * width <= _POSITIONS
