"""Hardware: which precisions a device multiplies, and which instructions a CPU has."""

from functools import cache
from pathlib import Path

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 in hardware; a CPU that emulates it is some 30 times slower."""
    match device.type:
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            return any(has_instructions(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        case _:
            return False


def has_instructions(name: str) -> bool:
    """Tell whether the CPU has the instructions of that name, as PyTorch calls them; one too old to know has none."""
    return getattr(torch.cpu, "get_capabilities", dict)().get(name, False)


@cache
def is_amds() -> bool:
    """Tell whether the CPU is AMD's, on which Intel's MKL multiplies float32 at three quarters of what oneDNN does."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
