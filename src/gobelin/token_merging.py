"""Token merging: patches that are alike attend to each other as one (Bolya and Hoffman 2023, arXiv 2303.17604)."""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MOST_MERGED = 0.75
"""The largest share that can be merged: one patch of each 2×2 stays."""


class MergedPatches:
    """The places of an image's patches among fewer, of which some stand for several that are alike.

    ``places`` [B, patches] are numbers of merged patches, and ``sizes`` [B, merged] count what each stands for.
    """

    def __init__(self, places: Tensor, sizes: Tensor):
        self._places = places
        self._sizes = sizes
        batch, count = sizes.shape
        self._rows = (torch.arange(batch, device=places.device)[:, None] * count + places).flatten()

    @classmethod
    def of(cls, hidden: Float[Tensor, "batch patches width"], height: int, share: float) -> Self:
        """Merge the share of the patches that are most like another one, in ``height`` rows (the paper's section 4).

        The upper left patch of each 2×2 stays, and each of the others may merge into the one of these that its features
        point most like. The paper draws the patch that stays at random; here an image depends on its own seed alone.
        """
        batch, patches, _ = hidden.shape
        numbers = torch.arange(patches, device=hidden.device)
        stays = torch.zeros(height, patches // height, dtype=torch.bool, device=hidden.device)
        stays[::2, ::2] = True
        staying, others = numbers[stays.flatten()], numbers[~stays.flatten()]
        direction = F.normalize(hidden, dim=-1)
        likeness, nearest = (direction[:, others] @ direction[:, staying].transpose(1, 2)).max(dim=-1)
        merging = likeness.argsort(dim=-1, descending=True, stable=True)[:, : int(share * patches)]

        stands_for = numbers.expand(batch, -1).clone()
        stands_for.scatter_(1, others[merging], staying[nearest.gather(1, merging)])
        rank = (stands_for == numbers).cumsum(dim=1) - 1
        places = rank.gather(1, stands_for)
        sizes = torch.zeros(batch, patches - merging.shape[1], dtype=torch.long, device=hidden.device)
        return cls(places, sizes.scatter_add(1, places, torch.ones_like(places)))

    def merge(self, hidden: Float[Tensor, "batch patches width"]) -> Float[Tensor, "batch merged width"]:
        """Average the patches that are merged."""
        batch, count = self._sizes.shape
        sums = hidden.new_zeros(batch * count, hidden.shape[-1]).index_add_(0, self._rows, hidden.flatten(0, 1))
        return sums.view(batch, count, -1) / self._sizes[:, :, None]

    def unmerge(self, merged: Float[Tensor, "batch merged width"]) -> Float[Tensor, "batch patches width"]:
        """Give every patch what the one has that stands for it."""
        return merged.flatten(0, 1)[self._rows].view(len(merged), -1, merged.shape[-1])

    def spread(
        self, probs: Float[Tensor, "*batch merged merged"], rows: slice | Sequence[int]
    ) -> Float[Tensor, "*batch patches patches"]:
        """Spread attention among merged patches: each of them has an equal part of what they were given together.

        ``rows`` are the images that the probabilities [B, merged, merged] or [B, heads, merged, merged] are of.
        """
        images = zip(probs, self._places[rows], self._sizes[rows], strict=True)
        return torch.stack([(one / sizes)[..., places, :][..., places] for one, places, sizes in images])
