"""Mixed precision of a training step: the matrices multiplied in bfloat16, the weights kept in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gobelin.kernels.hardware import has_fast_bfloat16
from gobelin.training.config import Precision


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Make the context in which a training step computes in ``precision`` on ``device``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in(device, precision) == torch.bfloat16)


def computes_in(device: torch.device, precision: Precision) -> torch.dtype:
    """Resolve a precision for a device: "auto" is bfloat16 where the device multiplies it in hardware."""
    bfloat16 = has_fast_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    return torch.bfloat16 if bfloat16 else torch.float32


class RoundedWeights:
    """Frozen weights of linear layers and convolutions, rounded to bfloat16 once and not in every step.

    Autocast rounds them alike. Weights that are trained are left to it, and so is everything where a step computes in
    float32.
    """

    def __init__(self, module: nn.Module, device: torch.device, precision: Precision):
        self._pairs: list[tuple[Tensor, Tensor]] = []
        if computes_in(device, precision) == torch.bfloat16:
            frozen = {
                id(parameter): parameter
                for layer in module.modules()
                if isinstance(layer, nn.Linear | nn.Conv2d)
                for parameter in (layer.weight, layer.bias)
                if parameter is not None and not parameter.requires_grad
            }
            self._pairs = [(one, _round(one.detach())) for one in frozen.values()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put them into the module while the block runs, which takes the forward pass and its backward pass."""
        whole = [parameter.data for parameter, _ in self._pairs]
        try:
            for parameter, rounded in self._pairs:
                parameter.data = rounded
            yield
        finally:
            for (parameter, _), data in zip(self._pairs, whole, strict=True):
                parameter.data = data


def _round(weight: Tensor) -> Tensor:
    """Round a weight to bfloat16; a kernel lies channels last, as hidden states do, or it is copied in every pass."""
    if weight.ndim == 4:
        return weight.to(torch.bfloat16, memory_format=torch.channels_last)
    return weight.to(torch.bfloat16)
