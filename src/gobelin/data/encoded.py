"""Latents and text embeddings on disk: computed once for each image, caption, network and preprocessing."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gobelin.data.cached_dataset import CachedDataset
from gobelin.data.row_cache import RowCache, content_hash, fill, hash_array
from gobelin.vae import Posterior

_STORED = torch.float16  # rounds latents by 2⁻¹², of which the VAE's own posterior is a hundred times as wide


def weights_hash(module: nn.Module) -> str:
    """Hash a network's weights: a SHA-256 of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class LatentCache:
    """Moments of the VAE's posterior of every image, and of its mirror image if images are flipped.

    ``key`` says with which network (:func:`weights_hash`); ``share`` selects the images that this process computes, and
    :meth:`refresh` is due when all processes are done.
    """

    def __init__(self, dataset: CachedDataset, folder: Path, key: str, flip: bool = False):
        self._dataset, self.flip = dataset, flip
        source = dataset.dataset
        self.folder = folder / f"latents-{content_hash(key, source.preprocessing_key).hex()}"
        self._cache = RowCache(self.folder)
        self._hashes = dataset.hashes
        self._mirrored = hash_array(content_hash(one, "flipped") for one in source.hashes) if flip else self._hashes

    def fill(
        self,
        encode: Callable[[Float[Tensor, "batch 3 height width"]], Posterior],
        share: slice = slice(None),
        advance: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Encode the images that are not there yet."""
        for mirrored, hashes in ((False, self._hashes), (True, self._mirrored))[: 1 + self.flip]:
            for bucket in np.unique(self._dataset.bucket_index):
                rows = np.flatnonzero(self._dataset.bucket_index == bucket)

                def compute(
                    positions: Int[np.ndarray, " batch"], rows: np.ndarray = rows, mirrored: bool = mirrored
                ) -> dict[str, Tensor]:
                    images = self._dataset.images(rows[positions].tolist())
                    posterior = encode(images.flip(-1) if mirrored else images)
                    std = (0.5 * posterior.logvar.float()).exp()
                    return {"mean": posterior.mean.to("cpu", _STORED), "std": std.to("cpu", _STORED)}

                fill(self._cache, hashes[rows], compute, share=share, advance=advance)

    def refresh(self) -> None:
        """Find what other processes have computed."""
        self._cache.refresh()

    def read(
        self, indices: Int[Tensor, " batch"], mirrored: Bool[Tensor, " batch"] | None = None
    ) -> tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch channels h w"]]:
        """Read (mean, standard deviation) of the unscaled latents of images of one bucket."""
        rows = indices.numpy()
        hashes = self._hashes[rows]
        if mirrored is not None and self.flip:
            hashes = np.where(mirrored.numpy(), self._mirrored[rows], hashes)
        found = self._cache.read(hashes)
        return found["mean"].float(), found["std"].float()


class TextCache:
    """Text embeddings of captions: each text once, the empty one among them; ``key`` says with which network."""

    def __init__(self, folder: Path, key: str):
        self.folder = folder / f"texts-{content_hash(key).hex()}"
        self._cache = RowCache(self.folder)

    def fill(
        self,
        dataset: CachedDataset,
        encode: Callable[[list[str]], Float[Tensor, "texts length dim"]],
        share: slice = slice(None),
        advance: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Encode the captions of a dataset, and the empty one, that are not there yet."""
        counts = [0]
        hashes = hash_array(
            content_hash(text) for index in range(len(dataset)) for text in _counted(dataset.captions(index), counts)
        )
        starts = np.cumsum(counts)

        def text_at(position: int) -> str:
            image = int(np.searchsorted(starts, position, side="right")) - 1
            return dataset.captions(image)[position - int(starts[image])]

        def compute(positions: Int[np.ndarray, " batch"]) -> dict[str, Tensor]:
            return _stored(encode([text_at(int(one)) for one in positions]))

        fill(self._cache, hash_array([content_hash("")]), lambda _: _stored(encode([""])))
        fill(self._cache, hashes, compute, share=share, advance=advance)

    def refresh(self) -> None:
        """Find what other processes have computed."""
        self._cache.refresh()

    def read(self, texts: list[str]) -> Float[Tensor, "texts length dim"]:
        """Read text embeddings."""
        return self._cache.read(hash_array(content_hash(text) for text in texts))["text_embeddings"].float()


def _stored(text_embeddings: Float[Tensor, "texts length dim"]) -> dict[str, Tensor]:
    return {"text_embeddings": text_embeddings.to("cpu", _STORED)}


def _counted(captions: tuple[str, ...], counts: list[int]) -> tuple[str, ...]:
    """Append the number of captions to ``counts``."""
    counts.append(len(captions))
    return captions
