"""The eager engine: PyTorch runs the model's own networks, operation by operation; on a CPU with layers of ours."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.attention import AnyAttentionEdit, AttentionMaps, ExtraWords, Reduction, Sites
from gobelin.engine_names import EngineName
from gobelin.engines.engine import DecoderRunner, LatentDecoder, NoisePredictor, PaintingNetworks, UNetRunner
from gobelin.engines.forwards import other_forwards
from gobelin.engines.fused_blocks import FusedBlocks, fusing_pays
from gobelin.engines.packed_weights import PackedWeights, pays
from gobelin.engines.unfolded_convolutions import unfolded_forwards
from gobelin.shortcuts import Shortcuts
from gobelin.types import Images, Latents, TextEmbeddings, TextMask
from gobelin.unet import UNet
from gobelin.vae import VAE

NetworkInput = Float[Tensor, "images in_channels h w"]


@runtime_checkable
class PreparedLayers(Protocol):
    """Layers or blocks of a network in another form, made of its weights, that compute the same."""

    def update(self) -> None: ...

    def in_use(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, kw_only=True)
class EagerEngine:
    """Run a model's own networks: their hooks are called, and what is put in a module's place is used.

    On a CPU, weights of wide networks are packed (:mod:`gobelin.engines.packed_weights`), blocks of narrow ones fused
    (:mod:`gobelin.engines.fused_blocks`), and feature maps are channels last, in which a row of patches and a feature
    map are the same memory. Where there is no memory for packed weights, in float32, convolutions of small maps are
    unfolded (:mod:`gobelin.engines.unfolded_convolutions`).
    """

    name: ClassVar[EngineName] = "eager"
    model: PaintingNetworks
    _packed_weights: PackedWeights = field(init=False)
    _packed_unet: "PreparedUNet" = field(init=False)
    _fused_unet: "PreparedUNet" = field(init=False)
    _packed_vae: "PreparedDecoder" = field(init=False)
    _fused_vae: "PreparedDecoder" = field(init=False)

    def __post_init__(self) -> None:
        unet, vae = self.model.unet, self.model.vae
        object.__setattr__(self, "_packed_weights", PackedWeights(unet))
        object.__setattr__(self, "_packed_unet", PreparedUNet(unet, self._packed_weights))
        object.__setattr__(self, "_fused_unet", PreparedUNet(unet, FusedBlocks(unet)))
        object.__setattr__(self, "_packed_vae", PreparedDecoder(vae, PackedWeights(vae.decoder)))
        object.__setattr__(self, "_fused_vae", PreparedDecoder(vae, FusedBlocks(vae.decoder)))

    @classmethod
    def of(cls, model: PaintingNetworks) -> Self:
        """Take the networks of a model."""
        return cls(model=model)

    @property
    def unet(self) -> NoisePredictor:
        """The U-Net, its weights packed or its blocks fused as they are now, or its convolutions unfolded."""
        unet = self.model.unet
        if fusing_pays(unet):
            return self._fused_unet.updated()
        packed = self._packed_unet.updated() if pays(unet) else None
        if packed is not None and self._packed_weights:
            return packed
        return UnfoldedUNet(unet) if unfolded_forwards(unet) else packed or unet

    @property
    def vae(self) -> LatentDecoder:
        """The VAE, whose decoder's weights are packed, or its blocks fused, when it is first used."""
        if pays(self.model.vae):
            return self._packed_vae
        return self._fused_vae if fusing_pays(self.model.vae) else self.model.vae


class _OtherLayersUNet(UNetRunner, ABC):
    """A U-Net some of whose layers compute in another way while it runs."""

    @abstractmethod
    def _other_layers(self) -> AbstractContextManager[None]: ...

    def _laid_out(self, latents: NetworkInput) -> NetworkInput:
        return latents

    def __call__(
        self,
        noisy_latents: NetworkInput,
        timesteps: Tensor,
        text_embeddings: TextEmbeddings,
        text_mask: TextMask | None = None,
    ) -> Latents:
        """Predict, as :class:`UNet` does."""
        with self._other_layers():
            return self._unet(self._laid_out(noisy_latents), timesteps, text_embeddings, text_mask)

    def trace(
        self,
        noisy_latents: NetworkInput,
        timesteps: Tensor,
        text_embeddings: TextEmbeddings,
        text_mask: TextMask | None = None,
        sites: Sites = None,
        reduce: Reduction = "heads",
        rows: slice | None = None,
        edits: Sequence[AnyAttentionEdit] = (),
        shortcuts: Shortcuts | None = None,
        unedited: int = 0,
        also: ExtraWords | None = None,
    ) -> tuple[Latents, AttentionMaps]:
        """Predict and record attention maps, as :meth:`UNet.trace` does."""
        with self._other_layers():
            latents = self._laid_out(noisy_latents)
            text = text_embeddings, text_mask
            return self._unet.trace(latents, timesteps, *text, sites, reduce, rows, edits, shortcuts, unedited, also)


class PreparedUNet(_OtherLayersUNet):
    """A U-Net that is run with packed weights or fused blocks."""

    def __init__(self, unet: UNet, layers: PreparedLayers):
        super().__init__(unet)
        self._layers = layers

    def updated(self) -> Self:
        """Prepare anew the layers whose weights have changed, and return this."""
        self._layers.update()
        return self

    def _other_layers(self) -> AbstractContextManager[None]:
        return self._layers.in_use()

    def _laid_out(self, latents: NetworkInput) -> NetworkInput:
        return _channels_last(latents)


class UnfoldedUNet(_OtherLayersUNet):
    """A U-Net that is run with unfolded convolutions wherever feature maps are small."""

    def _other_layers(self) -> AbstractContextManager[None]:
        return other_forwards(unfolded_forwards(self._unet))


class PreparedDecoder(DecoderRunner):
    """A VAE whose decoder is run with packed weights or fused blocks."""

    def __init__(self, vae: VAE, layers: PreparedLayers):
        super().__init__(vae)
        self._layers = layers

    def latents_to_images(self, latents: Latents) -> Images:
        """Decode, as :meth:`VAE.latents_to_images` does."""
        self._layers.update()
        with self._layers.in_use():
            return self._vae.latents_to_images(_channels_last(latents)).contiguous()

    def latents_to_large_images(self, latents: Latents, tile: int = 64, overlap: int = 16) -> Images:
        """Decode in tiles, as :meth:`VAE.latents_to_large_images` does."""
        self._layers.update()
        with self._layers.in_use():
            return self._vae.latents_to_large_images(_channels_last(latents), tile, overlap).contiguous()


def _channels_last(latents: NetworkInput) -> NetworkInput:
    return latents.contiguous(memory_format=torch.channels_last)
