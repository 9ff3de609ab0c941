"""Layers of torch that have a kernel of their own while they train in bfloat16 on a CPU.

Names, parameters and numbers are torch's, whose own code runs wherever else: in float32, on other devices, without
gradients, and where there is no compiler. The kernels have first derivatives alone.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
    if _trains_in_bfloat16_on_cpu(both):
        from gobelin.kernels.geglu import fused_geglu, takes_geglu

        if takes_geglu(both):
            return fused_geglu(both)
    hidden, gate = both.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def _trains_in_bfloat16_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled()
