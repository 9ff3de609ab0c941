"""Collector of attention maps: those of many steps become the heat maps of each image.

Tang et al. 2022 (DAAM, arXiv 2210.04885) sum them over steps and average them over layers and heads; so does Gobelin.
"""

from collections import Counter
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from gobelin.attention import AttentionMaps, AttentionSite, Trace
from gobelin.look.heatmaps import HeatMaps
from gobelin.words import Words


class Collector:
    """Accumulator of attention maps over the steps at which each site ran; memory does not grow with their number.

    With ``trace.per_step`` it keeps the maps of each step instead. With ``trace.negative`` the last ``images`` rows of
    a step are those of the prompts, and rows before them those of the negative ones, which not every step has.
    """

    def __init__(self, trace: Trace, images: int | None = None):
        self.trace = trace
        self._images = images
        self._negative = Collector(replace(trace, negative=False)) if trace.negative else None
        self._kept: dict[AttentionSite, list[Tensor]] = {}
        self._steps: Counter[AttentionSite] = Counter()

    def add(self, maps: AttentionMaps) -> None:
        """Add one step's maps, [B, patches, keys] or [B, heads, patches, keys]; an untraced step has none."""
        if self._negative is not None and self._images is not None:
            self._negative.add(
                {site: probs[: -self._images] for site, probs in maps.items() if len(probs) > self._images}
            )
            maps = {site: probs[-self._images :] for site, probs in maps.items()}
        for site, probs in maps.items():
            self._steps[site] += 1
            kept = self._kept.setdefault(site, [])
            if self.trace.per_step or not kept:
                kept.append(probs.clone())
            else:
                kept[0] += probs

    def maps(self, index: int) -> AttentionMaps:
        """Return the maps of image ``index``, [steps or 1, heads or 1, patches, keys]; of added steps the mean."""
        apart = self.trace.per_step
        maps = {
            site: torch.stack([probs[index] for probs in kept]) / (1 if apart else self._steps[site])
            for site, kept in self._kept.items()
        }
        return {site: (probs if self.trace.per_head else probs[:, None]).cpu() for site, probs in maps.items()}

    def heatmaps(
        self,
        index: int,
        words: Words,
        image: Image.Image,
        latent_size: tuple[int, int],
        also: Words | None = None,
        negative: Words | None = None,
    ) -> HeatMaps:
        """Make the heat maps of image ``index``: of the ``words`` of its prompt, and what else was traced.

        ``also`` are the words beside the prompt, whose shares follow the text's, and ``negative`` those of the negative
        prompt. Maps are sharp if the trace is.
        """
        maps = self.maps(index)
        found = HeatMaps(words=words, maps=_of_text(maps, words), latent_size=latent_size, image=image)
        if also is not None:
            beside = replace(found, words=also, maps=_after_text(maps, words), around=found)
            found = replace(found, also_traced=beside)
        if negative is not None and self._negative is not None and self._negative._kept:
            apart = _of_text(self._negative.maps(index), negative)
            found = replace(found, negative_traced=replace(found, words=negative, maps=apart, also_traced=None))
        return found.sharpened(self.trace.head_weights) if self.trace.sharp else found


def _of_text(maps: AttentionMaps, words: Words) -> AttentionMaps:
    """Take the shares of a text's own positions."""
    cut = slice(words.length)
    return {site: probs[..., cut].contiguous() if site.kind == "cross" else probs for site, probs in maps.items()}


def _after_text(maps: AttentionMaps, words: Words) -> AttentionMaps:
    """Take the shares of the words beside a text."""
    cut = slice(words.length, None)
    return {site: probs[..., cut].contiguous() if site.kind == "cross" else probs for site, probs in maps.items()}
