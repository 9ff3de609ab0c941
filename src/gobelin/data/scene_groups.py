"""Grounding of scenes: which tokens of a caption speak of which objects, and where these are, as exact masks say it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gobelin.data.row_cache import RowCache, content_hash, fill, hash_array
from gobelin.data.scene_dataset import SceneDataset
from gobelin.scenes import Sample
from gobelin.tokenizer import Tokenizer

MAX_GROUPS = 4
"""Groups of objects in a scene at most; a scene's most objects are as many."""


class GroundingCache:
    """Masks and tokens of every scene's groups of objects, computed once and kept in a folder.

    A group is of objects that the caption speaks of together, by words for nothing else: each of two objects is one,
    and so are three of a kind. Masks are shares of ``side`` × ``side`` patches. ``share`` selects the scenes that this
    process computes, and :meth:`refresh` is due when all processes are done.
    """

    def __init__(self, scenes: SceneDataset, tokenizer: Tokenizer, side: int, folder: Path):
        self._scenes, self._tokenizer, self._side = scenes, tokenizer, side
        vocabulary = repr(sorted(tokenizer.vocab.items())) + repr(tokenizer.max_length)
        self.folder = folder / f"grounding-{content_hash(vocabulary, str(side), scenes.preprocessing_key).hex()}"
        self._cache = RowCache(self.folder)
        self._hashes = hash_array(content_hash(one) for one in scenes.hashes)

    def fill(self, share: slice = slice(None), advance: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compute those of the scenes that are not there yet."""

        def compute(positions: Int[np.ndarray, " batch"]) -> dict[str, Tensor]:
            found = [ground(self._scenes.sample(int(position)), self._tokenizer, self._side) for position in positions]
            masks, tokens = (torch.from_numpy(np.stack(parts)) for parts in zip(*found, strict=True))
            return {"masks": (255 * masks).round().byte(), "tokens": tokens.byte()}

        fill(self._cache, self._hashes, compute, share=share, advance=advance)

    def refresh(self) -> None:
        """Find what other processes have computed."""
        self._cache.refresh()

    def read(
        self, indices: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch groups side side"], Bool[Tensor, "batch groups length"]]:
        """Read the masks, shares of patches, and the tokens of groups; a group that is not there has no tokens."""
        found = self._cache.read(self._hashes[indices.numpy()])
        return found["masks"].float() / 255, found["tokens"].bool()


def ground(
    sample: Sample, tokenizer: Tokenizer, side: int
) -> tuple[Float[np.ndarray, "groups side side"], Bool[np.ndarray, "groups length"]]:
    """Find the groups of a scene's objects: their masks as shares of patches, and the tokens that speak of them."""
    masks = np.zeros((MAX_GROUPS, side, side), np.float32)
    tokens = np.zeros((MAX_GROUPS, tokenizer.max_length), np.bool_)
    spans = tokenizer.words(sample.caption).spans
    patch = sample.masks.shape[1] // side
    for group, things in enumerate(_groups(sample)):
        shown = sample.masks[list(things)].any(axis=0).astype(np.float32)
        masks[group] = shown.reshape(side, patch, side, patch).mean(axis=(1, 3))
        for span, (_, spoken_of) in zip(spans, sample.words, strict=True):
            if spoken_of == things:
                tokens[group, [token for token in span.tokens if token < tokenizer.max_length]] = True
    return masks, tokens


def _groups(sample: Sample) -> list[tuple[int, ...]]:
    """List the sets of objects that words speak of, small ones first, without those that share objects with others."""
    taken: list[tuple[int, ...]] = []
    for things in sorted({things for _, things in sample.words if things}, key=lambda things: (len(things), things)):
        if not any(set(things) & set(other) for other in taken):
            taken.append(things)
    return taken
