"""Layers of torch that have a kernel of their own while they train in bfloat16 on a CPU.

Names, parameters and numbers are torch's, whose own code runs wherever else: in float32, on other devices, without
gradients, and where there is no compiler. The kernels have first derivatives alone.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gobelin import kernels


class Conv2d(nn.Conv2d):
    """Convolution. What the kernel returns lies in memory channels last; a 1×1 of such an input is a linear layer."""

    def forward(
        self, input: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels new_height new_width"]:
        if _autocasts_to_bfloat16_on_cpu(input, self.weight) and self._keeps_size():
            from gobelin.kernels import convolution  # compiles: only where it is used

            rounded = input.to(torch.bfloat16)
            if self.kernel_size == (1, 1) and rounded.is_contiguous(memory_format=torch.channels_last):
                pixels = rounded.permute(0, 2, 3, 1)
                return F.linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
            if convolution.takes_convolution(rounded, self.weight, self.bias):
                return convolution.fused_convolution(rounded, self.weight, self.bias)
        return super().forward(input)

    def _keeps_size(self) -> bool:
        """Tell whether there is an output for every pixel, of all channels around it."""
        side = self.kernel_size[0]
        return (
            (self.kernel_size, self.padding) == ((side, side), (side // 2, side // 2))
            and (self.stride, self.dilation, self.groups) == ((1, 1), (1, 1), 1)
            and self.padding_mode == "zeros"
        )


class GroupNorm(nn.GroupNorm):
    """Group norm, with SiLU after it where asked for. What the kernel returns lies in memory channels last."""

    def forward(
        self, input: Float[Tensor, "batch channels height width"], silu: bool = False
    ) -> Float[Tensor, "batch channels height width"]:
        if _trains_in_bfloat16_on_cpu(input) and input.ndim == 4:
            from gobelin.kernels import norms  # compiles: only where it is used

            if norms.takes_norm(input, self.weight):
                return norms.fused_group_norm(input, self.weight, self.bias, self.num_groups, self.eps, silu)
        normed = super().forward(input)
        return F.silu(normed) if silu else normed


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension."""

    def forward(self, input: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        if _trains_in_bfloat16_on_cpu(input):
            from gobelin.kernels import norms

            if norms.takes_norm(input, self.weight):
                return norms.fused_layer_norm(input, self.weight, self.bias, self.eps)
        return super().forward(input)


def geglu(both: Float[Tensor, "*rows twice_width"]) -> Float[Tensor, "*rows width"]:
    """Multiply the first half of every row by the GELU of the second."""
    if _is_bfloat16_on_cpu(both):
        from gobelin.kernels.geglu import fused_geglu, takes_geglu

        if takes_geglu(both):
            return fused_geglu(both)
    hidden, gate = both.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def _autocasts_to_bfloat16_on_cpu(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def _trains_in_bfloat16_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled()


def _is_bfloat16_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not kernels.leave_gobelin()
