"""Shortcuts: what passes of a U-Net leave out of a painting that is asked to be faster, and only nearly the same.

Two compose: *deep features are kept* from one pass for others (DeepCache, Ma et al. 2023, arXiv 2312.00858), and
*tokens are merged* (:mod:`gobelin.token_merging`).
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(kw_only=True)
class DeepFeatures:
    """Deep features: what the deep layers of a U-Net return, kept by one pass for later ones.

    A pass that finds none here runs whole, and leaves its own; one that finds some runs the other layers alone.
    """

    hidden: Float[Tensor, "batch channels height width"] | None = None


@dataclass(frozen=True, kw_only=True)
class Shortcuts:
    """Shortcuts of one pass: ``merge_tokens`` is the share of merged patches, and ``deep`` where features are kept."""

    merge_tokens: float = 0.0
    deep: DeepFeatures | None = None


@dataclass(kw_only=True)
class ShortcutPlan:
    """Plan the shortcuts of a painting's passes, from its first to its last.

    Of ``cache_interval`` passes one is whole, and the others take its deep features. Whole are also the first pass,
    those at ``last_timestep``, the first with the other number of a guidance's halves, as where a guidance interval
    begins, and the first after controls. A pass in which controls change or watch attention has no shortcuts at all.
    """

    cache_interval: int
    merge_tokens: float
    last_timestep: float
    _deep: DeepFeatures | None = None
    _halves: int = 0
    _taken: int = 0

    def next(self, halves: int, timestep: float, is_controlled: bool) -> Shortcuts | None:
        """Choose the shortcuts of the next pass, of one or both ``halves`` of a guidance; None where controls act."""
        if is_controlled:
            self._deep = None  # what was kept is of a painting without the controls
            return None
        if self.cache_interval == 1:
            return Shortcuts(merge_tokens=self.merge_tokens)
        goes_on = self._deep is not None and halves == self._halves and timestep > self.last_timestep
        if not goes_on or self._taken == self.cache_interval - 1:
            self._deep, self._halves, self._taken = DeepFeatures(), halves, 0
        else:
            self._taken += 1
        return Shortcuts(merge_tokens=self.merge_tokens, deep=self._deep)
