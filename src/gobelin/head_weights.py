"""Head weights: what each head of attention says of where a word's object is, as a logistic regression.

Heads differ: in some a patch hears the word that it shows, in others BOS where there is nothing. For every model of
scenes, :mod:`gobelin.evaluate.fit_heads` fits weights of these features to exact masks, and keeps them beside the
model. That heads are to be weighed and BOS kept is an idea of Meng et al. 2026 (GoCA, arXiv 2603.06178), and to choose
among them one of Park et al. 2026 (arXiv 2604.05906); both do it without masks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.errors import ModelError

_SMALL = 0.01  # share of attention below which a logarithm goes no deeper
WORD_FEATURES = ("share", "share_of_maximum", "bos")
"""Of a head of cross-attention (attn2), logarithms: a word's share, that over its maximum in the image, BOS's share."""
PATCH_FEATURES = ("gathers_word", "gathers_bos", "gives_word", "gives_bos", "gives")
"""Of a head of self-attention (attn1), logarithms: what a patch gathers of the word's and of BOS's mean shares from the
patches that it attends to, what those give it that attend to it (over the maximum; a mean), and how much attention."""


def head_features(
    share: Float[Tensor, "words heads patches"],
    bos: Float[Tensor, "#words heads patches"],
    own: Float[Tensor, "own_heads patches patches"],
) -> Float[Tensor, "words features patches"]:
    """Compute the features of each word and patch: ``WORD_FEATURES`` of each head, then ``PATCH_FEATURES`` of each.

    ``share`` are words' shares of the attention of each head of attn2, ``bos`` those of BOS, and ``own`` the
    probabilities of attn1, from the patches of its second axis to those of its last.
    """
    word, start = share.mean(dim=1), bos.mean(dim=1)
    attention = own.sum(dim=1)  # that a patch is given by all others
    by_word = (share, _of_maximum(share), bos)
    by_patch = (
        _of_maximum(torch.einsum("wk,hqk->whq", word, own)),
        torch.einsum("wk,hqk->whq", start, own),
        _of_maximum(torch.einsum("wq,hqk->whk", word, own)),
        torch.einsum("wq,hqk->whk", start, own) / attention.clamp(min=_SMALL**3),
        attention[None],
    )
    words = share.shape[0]  # not len(), which export to ONNX would take for a number that never changes
    return torch.cat([(each + _SMALL).log().expand(words, -1, -1) for each in (*by_word, *by_patch)], dim=1)


def _of_maximum(maps: Tensor) -> Tensor:
    """Divide maps by their maxima over patches."""
    return maps / maps.amax(dim=-1, keepdim=True).clamp(min=_SMALL**3)


@dataclass(frozen=True, kw_only=True)
class HeadWeights:
    """Weights of :func:`head_features`: a logistic regression of whether a patch shows what a word speaks of.

    ``cross`` and ``own`` name the sites of attn2 and attn1, all of one grid, with their numbers of heads; ``weights``
    are of the features, in their order, and ``bias`` is added. Raises :class:`ModelError` where they do not fit
    together.
    """

    cross: Mapping[str, int]
    own: Mapping[str, int]
    weights: Float[Tensor, " features"]
    bias: float

    def __post_init__(self) -> None:
        features = len(WORD_FEATURES) * sum(self.cross.values()) + len(PATCH_FEATURES) * sum(self.own.values())
        heads = [*self.cross.values(), *self.own.values()]
        is_whole = self.cross and self.own and min(heads) > 0 and self.weights.shape == (features,)
        if not is_whole or not math.isfinite(self.bias) or not self.weights.isfinite().all():
            raise ModelError(f"head weights: expected {features} finite weights of heads of attn2 and attn1")

    def logits(
        self,
        share: Float[Tensor, "words heads patches"],
        bos: Float[Tensor, "#words heads patches"],
        own: Float[Tensor, "own_heads patches patches"],
    ) -> Float[Tensor, "words patches"]:
        """Compute the log-odds that each patch shows what each word speaks of, from :func:`head_features`."""
        return torch.einsum("wfp,f->wp", head_features(share, bos, own), self.weights) + self.bias

    def fits(self, sites: Mapping[str, int]) -> bool:
        """Tell whether all its sites are there, by name and number of heads."""
        return all(sites.get(name) == heads for there in (self.cross, self.own) for name, heads in there.items())

    def to_json(self) -> dict[str, Any]:
        """Convert to what JSON holds: each site's weights by feature, in the order of its heads."""
        sites: dict[str, dict[str, list[float]]] = {}
        begin = 0
        for there, features in ((self.cross, WORD_FEATURES), (self.own, PATCH_FEATURES)):
            for feature in features:
                for name, heads in there.items():
                    found = self.weights[begin : begin + heads].tolist()
                    sites.setdefault(name, {})[feature] = [round(weight, 5) for weight in found]
                    begin += heads
        return {"bias": round(self.bias, 5), "sites": sites}

    @classmethod
    def from_json(cls, content: Any, source: object) -> Self:
        """Read what :meth:`to_json` makes; raises :class:`ModelError` that names the ``source`` for anything else."""
        try:
            sites: Mapping[str, Mapping[str, Sequence[float]]] = content["sites"]
            kinds = [
                {name: found for name, found in sites.items() if set(found) == set(features)}
                for features in (WORD_FEATURES, PATCH_FEATURES)
            ]
            if sum(map(len, kinds)) != len(sites):
                raise KeyError("features")
            weights = [
                float(weight)
                for there, features in zip(kinds, (WORD_FEATURES, PATCH_FEATURES), strict=True)
                for feature in features
                for found in there.values()
                for weight in found[feature]
            ]
            heads = [{name: len(next(iter(found.values()))) for name, found in there.items()} for there in kinds]
            return cls(cross=heads[0], own=heads[1], weights=torch.tensor(weights), bias=float(content["bias"]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, StopIteration, ModelError) as error:
            raise ModelError(
                f"{source} holds no head weights: expected those that gobelin evaluate heads writes; without it, maps "
                "are made as of any model"
            ) from error
