"""Other forwards of a network's layers, for as long as some part of a program computes with them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock

from torch import Tensor, nn

_LOCK = Lock()
_USES: Counter[nn.Module] = Counter()  # of the forwards that stand in layers, by all threads


@contextmanager
def other_forwards(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Call these in place of the layers' forwards, between the same hooks; one that somebody else put there stays.

    Several threads may do so at once: a layer gets its own forward back when the last of them has ended.
    """
    with _LOCK:
        changed = [layer for layer in forwards if layer in _USES or "forward" not in vars(layer)]
        for layer in changed:
            vars(layer).setdefault("forward", forwards[layer])
        _USES.update(changed)
    try:
        yield
    finally:
        with _LOCK:
            _USES.subtract(changed)
            for layer in changed:
                if not _USES[layer]:
                    del _USES[layer]
                    vars(layer).pop("forward", None)


def is_replaced(layer: nn.Module) -> bool:
    """Tell whether somebody else put another forward in a layer's place."""
    with _LOCK:
        return "forward" in vars(layer) and layer not in _USES
