"""Kernels of our own, in C++: compiled where they are first used, and never needed.

:mod:`gobelin.kernels.compiled` finds a compiler and keeps what it made; where there is none, callers do without.
"""

import torch


def leave_gobelin() -> bool:
    """Tell whether operations are recorded for another runtime, which knows no kernel of ours."""
    is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # since PyTorch 2.7
    return torch.jit.is_tracing() or is_exporting()  # pyright: ignore[reportPrivateImportUsage]
