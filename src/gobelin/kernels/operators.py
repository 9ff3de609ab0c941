"""Libraries of the kernels' operators: on which machines there are any, and a call of their functions."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from gobelin.kernels.compiled import load_library
from gobelin.kernels.hardware import has_instructions
from gobelin.kernels.operands import call, openmp

_FOLDER = Path(__file__).parent
FunctionT = TypeVar("FunctionT", bound=Callable)


def constant(function: FunctionT) -> FunctionT:
    """Mark a function whose result torch.compile may take for a constant.

    As ``torch.compiler.assume_constant_result`` does, which imports the compiler for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Kernel:
    """A C++ source beside this file, with the files that it includes; it is compiled where it is first needed.

    It wants a CPU with AVX512-BF16, or other ``instructions``, Linux, which keeps its users apart, and threads of
    torch's.
    """

    def __init__(
        self,
        source: str,
        *includes: str,
        flags: Sequence[str] = (),
        instructions: Sequence[str] = ("avx512_bf16",),
    ):
        self._source, self._includes, self._flags = _FOLDER / source, [_FOLDER / one for one in includes], flags
        self._instructions = instructions

    @cached_property
    def library(self) -> ctypes.CDLL | None:
        """Load the library; None on a machine that has none."""
        if sys.platform != "linux" or not all(map(has_instructions, self._instructions)) or openmp() is None:
            return None
        return load_library(self._source, self._includes, self._flags)

    def run(self, function: str, problem: ctypes.Structure) -> None:
        """Call a function of the library in torch's number of threads; raises MemoryError where there is not enough."""
        assert self.library is not None
        call(self.library, function, problem)
