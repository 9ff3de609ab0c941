"""Workloads: what all contenders of a row compute, and the contenders, each one a line."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Call = Callable[[], Tensor | float | None]
"""One call of a contender; its result is compared with the reference, or is what was measured."""
Unit = Literal["s", "MB"]
BenchPrecision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of computing a workload: ``prepare`` loads, converts and compiles, and returns the call.

    ``peer`` is the program that it needs, None for our own; ``against`` names a contender beside the first one that it
    is divided by too, such as its own untraced pass. What ``is_compared`` is compared with the reference.
    """

    name: str
    prepare: Callable[[], Call]
    peer: str | None = None
    against: str | None = None
    is_compared: bool = True


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The contenders of a row, of which the first is what the others are divided by.

    ``reference`` computes the result in float32; ``operations`` counts those of a call, a multiplication and an
    addition being two. Calls are timed, or return what they measured, in the ``unit``. A call has ``samples`` in it.
    """

    contenders: Sequence[Contender]
    reference: Callable[[], Tensor] | None = None
    operations: Callable[[], int] | None = None
    unit: Unit = "s"
    samples: int = 1
    is_timed: bool = True

    def limited_to(self, names: Collection[str]) -> Self:
        """Keep the first contender, and those of the others that are named; all for no name."""
        kept = [one for number, one in enumerate(self.contenders) if number == 0 or not names or one.name in names]
        return replace(self, contenders=kept)


def count_operations(run: Callable[[], object]) -> int:
    """Count the operations of the matrix products and convolutions in a run, attention's among them.

    A multiplication and an addition are two. On the meta device nothing is computed. Attention is taken apart into its
    products, as the counter does not know every fused kernel.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
