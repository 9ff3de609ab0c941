"""Sharp heat maps of several images while they are painted, with words' shares at each step in little memory."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gobelin.attention import AttentionMaps, AttentionSite, Trace
from gobelin.look.collector import Collector
from gobelin.look.heatmaps import HeatMaps
from gobelin.look.page import word_shares
from gobelin.words import Words

_BLANK = Image.new("RGB", (1, 1))  # shares need no image


class StepCollector:
    """Collector of the sharp maps of a painting, and of every word's share at each of its steps.

    ``trace`` is :func:`gobelin.look.sharp_maps.sharp_trace`: its sites have to be traced at every step, and from its
    start on, in shares of the way, they go into the mean. The maps of single steps are not kept, only what
    :func:`gobelin.look.page.word_shares` makes of them.
    """

    def __init__(self, trace: Trace, words: Sequence[Words], latent_size: tuple[int, int]):
        self._trace = trace
        self._words = words
        self._latent_size = latent_size
        self._late = Collector(trace)
        self._shares: list[list[Tensor]] = [[] for _ in words]

    def add(self, maps: AttentionMaps, progress: float) -> None:
        """Add a step's maps, as to a :class:`Collector`, at a share of the way; one without any repeats the last."""
        if progress >= self._trace.start:
            self._late.add(maps)
        for index, shares in enumerate(self._shares):
            own: dict[AttentionSite, Tensor] = {
                site: (probs[None, index] if self._trace.per_head else probs[None, None, index]).cpu()
                for site, probs in maps.items()
            }
            if own:
                shares.append(word_shares(self._heatmaps(index, own, _BLANK)))
            elif shares:
                shares.append(shares[-1])

    def heatmaps(self, index: int, image: Image.Image) -> HeatMaps:
        """Return the sharp heat maps of image ``index``: word for word those that ``trace="sharp"`` gives.

        Without head weights only the mean of self-attention over the sites of a grid is kept, which is all that
        sharpening asks for, and a third of the memory.
        """
        maps = self._late.maps(index)
        if self._trace.head_weights is not None:
            return self._heatmaps(index, maps, image)
        by_grid: dict[tuple[int, int], list[AttentionSite]] = {}
        for site in maps:
            if site.kind == "self":
                by_grid.setdefault(site.grid(*self._latent_size), []).append(site)
        for sites in by_grid.values():
            mean = torch.stack([maps.pop(site) for site in sites]).mean(dim=0)
            maps[sites[0]] = mean
        return self._heatmaps(index, maps, image)

    def shares(self, index: int) -> Float[Tensor, "steps words rows columns"]:
        """Stack the words' shares of image ``index`` at each step."""
        return torch.stack(self._shares[index])

    def _heatmaps(self, index: int, maps: AttentionMaps, image: Image.Image) -> HeatMaps:
        heatmaps = HeatMaps(words=self._words[index], maps=maps, latent_size=self._latent_size, image=image)
        return heatmaps.sharpened(self._trace.head_weights)
