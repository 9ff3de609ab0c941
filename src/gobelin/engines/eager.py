"""The eager engine: PyTorch runs the model's own networks, operation by operation; on a CPU with layers of ours."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from gobelin.attention import AttentionEdit, AttentionMaps, Reduction, Sites
from gobelin.engine_names import EngineName
from gobelin.engines.engine import DecoderRunner, LatentDecoder, NoisePredictor, PaintingNetworks, UNetRunner
from gobelin.engines.forwards import other_forwards
from gobelin.engines.packed_weights import PackedWeights, pays
from gobelin.engines.unfolded_convolutions import unfolded_forwards
from gobelin.shortcuts import Shortcuts
from gobelin.types import Images, Latents, TextEmbeddings, TextMask
from gobelin.unet import UNet
from gobelin.vae import VAE


@dataclass(frozen=True, kw_only=True)
class EagerEngine:
    """Run a model's own networks: their hooks are called, and what is put in a module's place is used.

    Where it pays, weights are packed (:mod:`gobelin.engines.packed_weights`), and feature maps are channels last, in
    which a row of patches and a feature map are the same memory. In float32, convolutions of small maps are unfolded
    (:mod:`gobelin.engines.unfolded_convolutions`).
    """

    name: ClassVar[EngineName] = "eager"
    model: PaintingNetworks
    _packed_unet: "PackedUNet" = field(init=False)
    _packed_vae: "PackedDecoder" = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_packed_unet", PackedUNet(self.model.unet))
        object.__setattr__(self, "_packed_vae", PackedDecoder(self.model.vae))

    @classmethod
    def of(cls, model: PaintingNetworks) -> Self:
        """Take the networks of a model."""
        return cls(model=model)

    @property
    def unet(self) -> NoisePredictor:
        """The U-Net, its weights packed as they are now, or its convolutions unfolded."""
        if pays(self.model.unet):
            return self._packed_unet.updated()
        return UnfoldedUNet(self.model.unet) if unfolded_forwards(self.model.unet) else self.model.unet

    @property
    def vae(self) -> LatentDecoder:
        """The VAE, whose decoder's weights are packed when it is first used."""
        return self._packed_vae if pays(self.model.vae) else self.model.vae


class _OtherLayersUNet(UNetRunner, ABC):
    """A U-Net some of whose layers compute in another way while it runs."""

    @abstractmethod
    def _other_layers(self) -> AbstractContextManager[None]: ...

    def _laid_out(self, latents: Latents) -> Latents:
        return latents

    def __call__(
        self,
        noisy_latents: Latents,
        timesteps: Tensor,
        text_embeddings: TextEmbeddings,
        text_mask: TextMask | None = None,
    ) -> Latents:
        """Predict, as :class:`UNet` does."""
        with self._other_layers():
            return self._unet(self._laid_out(noisy_latents), timesteps, text_embeddings, text_mask)

    def trace(
        self,
        noisy_latents: Latents,
        timesteps: Tensor,
        text_embeddings: TextEmbeddings,
        text_mask: TextMask | None = None,
        sites: Sites = None,
        reduce: Reduction = "heads",
        rows: slice | None = None,
        edits: Sequence[AttentionEdit] = (),
        shortcuts: Shortcuts | None = None,
    ) -> tuple[Latents, AttentionMaps]:
        """Predict and record attention maps, as :meth:`UNet.trace` does."""
        with self._other_layers():
            latents = self._laid_out(noisy_latents)
            text = text_embeddings, text_mask
            return self._unet.trace(latents, timesteps, *text, sites, reduce, rows, edits, shortcuts)


class PackedUNet(_OtherLayersUNet):
    """A U-Net that is run with packed weights."""

    def __init__(self, unet: UNet):
        super().__init__(unet)
        self._weights = PackedWeights(unet)

    def updated(self) -> Self:
        """Pack the weights that have changed, and return this."""
        self._weights.update()
        return self

    def _other_layers(self) -> AbstractContextManager[None]:
        return self._weights.in_use()

    def _laid_out(self, latents: Latents) -> Latents:
        return _channels_last(latents)


class UnfoldedUNet(_OtherLayersUNet):
    """A U-Net that is run with unfolded convolutions wherever feature maps are small."""

    def _other_layers(self) -> AbstractContextManager[None]:
        return other_forwards(unfolded_forwards(self._unet))


class PackedDecoder(DecoderRunner):
    """A VAE whose decoder is run with packed weights."""

    def __init__(self, vae: VAE):
        super().__init__(vae)
        self._weights = PackedWeights(vae.decoder)

    def latents_to_images(self, latents: Latents) -> Images:
        """Decode, as :meth:`VAE.latents_to_images` does."""
        self._weights.update()
        with self._weights.in_use():
            return self._vae.latents_to_images(_channels_last(latents)).contiguous()

    def latents_to_large_images(self, latents: Latents, tile: int = 64, overlap: int = 16) -> Images:
        """Decode in tiles, as :meth:`VAE.latents_to_large_images` does."""
        self._weights.update()
        with self._weights.in_use():
            return self._vae.latents_to_large_images(_channels_last(latents), tile, overlap).contiguous()


def _channels_last(latents: Latents) -> Latents:
    return latents.contiguous(memory_format=torch.channels_last)
