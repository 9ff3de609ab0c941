"""Exponential moving average (EMA) of the weights that are trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """Average of a module's trained weights, whose decay rises from 2/11 to ``decay`` as in TensorFlow's.

    Frozen weights have no average: a LoRA's takes as little memory as the LoRA.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.averages = {name: value.detach().clone() for name, value in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights, after optimizer step ``step`` (from 0); the first step sets them."""
        rate = 1.0 if step == 0 else 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(  # type: ignore[attr-defined]
            list(self.averages.values()), list(self._parameters.values()), rate
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the weights' place while the block runs."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange the weights and their averages."""
        for name, parameter in self._parameters.items():
            self.averages[name], parameter.data = parameter.data, self.averages[name]
