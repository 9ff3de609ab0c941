"""Upsampling and the 3×3 convolution behind it as one 2×2 convolution of the small map, for half of the time.

Of nine pixels under the window, of a map whose rows and columns stand twice, several are the same. A pixel of the large
map sees two rows and two columns of the small one; which weights meet which depends on whether its own row and column
are even or odd. So there are four windows of 2×2, of sums of the weights: 16 products in place of 36.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.engines.packed_convolution import PackedConvolution
from gobelin.layers import Upsample2D


def pack_upsampling(block: Upsample2D) -> Callable[[Tensor], Tensor]:
    """Pack an upsampling by two; what is returned computes one of a map, without gradients."""
    convolve = PackedConvolution(lambda: phase_weights(block.conv.weight.detach()), (1, 1), (1, 1), (1, 1), 1)
    channels = block.conv.out_channels

    def upsample(hidden: Tensor) -> Tensor:
        bias = None if block.conv.bias is None else block.conv.bias.repeat(4)
        every = convolve(hidden, bias).permute(0, 2, 3, 1).unflatten(-1, (2, 2, channels))
        batch, height, width = len(hidden), *hidden.shape[2:]
        out = hidden.new_empty(batch, height, 2, width, 2, channels)
        for row in range(2):
            for column in range(2):
                # Windows reach over every edge: the even ones begin there, the odd ones one further.
                out[:, :, row, :, column] = every[:, row : row + height, column : column + width, row, column]
        return out.view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)

    return upsample


def phase_weights(
    weight: Float[Tensor, "out in 3 3"],
) -> Float[Tensor, "4*out in 2 2"]:
    """Add up the weights that meet the same pixel: of even and odd rows, and in each of even and odd columns."""
    by_row = torch.stack(_halves(weight.float(), 2))  # [row phase, out, in, 2, 3]
    by_column = torch.stack(_halves(by_row, 4), dim=1)  # [row phase, column phase, out, in, 2, 2]
    return by_column.flatten(0, 2).to(weight.dtype)


def _halves(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Sum three weights to the two of an even position, which sees its left neighbour first, and of an odd one."""
    first, second, third = weight.split(1, dim=axis)
    return torch.cat([first, second + third], dim=axis), torch.cat([first + second, third], dim=axis)
