"""Hardware: which precisions a device multiplies, and which instructions a CPU has."""

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 in hardware; a CPU that emulates it is some 30 times slower."""
    match device.type:
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            return any(has_instructions(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        case _:
            return False


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 faster than float32.

    Intel's CPUs whose vectors multiply it, and that have no tiles (AMX) or are not let use them, as some virtual
    machines are not, take 1.8 times as long for it as for float32 ("Intel's CPUs without AMX" in docs/decisions.md).
    """
    if device.type == "cpu" and has_bfloat16(device):
        return has_instructions("amx_bf16") or not is_intels()
    return has_bfloat16(device)


def has_instructions(name: str) -> bool:
    """Tell whether the CPU has the instructions of that name, as PyTorch calls them; one too old to know has none."""
    return getattr(torch.cpu, "get_capabilities", dict)().get(name, False)


@dataclass(frozen=True)
class InstructionSet:
    """Instructions of CPUs that a kernel is compiled for: their names as PyTorch has them, and the compiler's flags."""

    names: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def is_here(self) -> bool:
        """Tell whether this CPU has all of them."""
        return all(map(has_instructions, self.names))


AVX2 = InstructionSet(("avx2", "fma3"), ("-march=x86-64-v3",))
AVX512 = InstructionSet(
    tuple(f"avx512_{part}" for part in ("f", "bw", "cd", "dq", "vl")),
    ("-march=x86-64-v4",),
)
AVX512_BF16 = InstructionSet(("avx512_bf16",), ("-march=x86-64-v4", "-mavx512bf16"))  # which only CPUs of v4 have
AMX = InstructionSet(("avx512_bf16", "amx_bf16"), (*AVX512_BF16.flags, "-mamx-tile", "-mamx-bf16"))
FLOAT32_VECTORS = (AVX512_BF16, AVX512, AVX2)
"""Sets with vectors of float32 (``vectors.hpp``); of bfloat16 the first has them, too."""


@cache
def is_intels() -> bool:
    """Tell whether the CPU is Intel's, as Linux or Windows names it."""
    try:
        named = Path("/proc/cpuinfo").read_text()
    except OSError:
        named = platform.processor()
    return "GenuineIntel" in named
