"""Libraries of the kernels' operators: on which machines there are any, and a call of their functions."""

import ctypes
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from gobelin.kernels.compiled import load_library
from gobelin.kernels.hardware import InstructionSet
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
    """A C++ source beside this file, which may include the headers there; it is compiled where it is first needed.

    It wants a CPU with one of ``instruction_sets``, of which it is compiled for the first, Linux, which keeps its users
    apart, and threads of torch's.
    """

    def __init__(self, source: str, *instruction_sets: InstructionSet):
        self._source, self._instruction_sets = _FOLDER / source, instruction_sets

    @cached_property
    def library(self) -> ctypes.CDLL | None:
        """Load the library; None on a machine that has none."""
        found = next((one for one in self._instruction_sets if one.is_here), None)
        if sys.platform != "linux" or found is None or openmp() is None:
            return None
        return load_library(self._source, sorted(_FOLDER.glob("*.hpp")), found.flags)

    def constant(self, name: str) -> int:
        """Read a number, int64_t, that the library has by name."""
        assert self.library is not None
        return ctypes.c_int64.in_dll(self.library, name).value

    def run(self, function: str, problem: ctypes.Structure) -> None:
        """Call a function of the library in torch's number of threads; raises MemoryError where there is not enough."""
        assert self.library is not None
        call(self.library, function, problem)
