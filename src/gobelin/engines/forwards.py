"""Layers that compute in another way for a while: an instance's own forward in place of its class's."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def other_forwards(forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Call these in place of the layers' forwards, between the same hooks; one that somebody else put there stays."""
    changed = [layer for layer in forwards if "forward" not in vars(layer)]
    for layer in changed:
        vars(layer)["forward"] = forwards[layer]
    try:
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)
