"""Mixed precision of a training step: the matrices multiplied in bfloat16, the weights kept in float32."""

import torch

from gobelin.kernels.hardware import has_fast_bfloat16
from gobelin.training.config import Precision


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Make the context in which a training step computes in ``precision`` on ``device``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in(device, precision) == torch.bfloat16)


def computes_in(device: torch.device, precision: Precision) -> torch.dtype:
    """Resolve a precision for a device: "auto" is bfloat16 where the device multiplies it faster than float32."""
    bfloat16 = has_fast_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    return torch.bfloat16 if bfloat16 else torch.float32
