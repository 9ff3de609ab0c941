"""The protocols of an engine: what a denoiser needs of a U-Net, and what painting needs of a VAE to decode."""

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from gobelin.attention import AnyAttentionEdit, AttentionMaps, AttentionSite, ExtraWords, Reduction, Sites
from gobelin.engine_names import EngineName
from gobelin.shortcuts import Shortcuts
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig


@runtime_checkable
class NoisePredictor(Protocol):
    """A U-Net, or what runs one: noisy latents, timesteps and text in, the prediction out, as :class:`UNet` says it."""

    @property
    def config(self) -> UNetConfig: ...

    @property
    def attention_sites(self) -> tuple[AttentionSite, ...]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(
        self,
        noisy_latents: Float[Tensor, "images in_channels height width"],
        timesteps: Num[Tensor, " images"],
        text_embeddings: Float[Tensor, "batch length text_width"],
        text_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch out_channels height width"]: ...

    def trace(
        self,
        noisy_latents: Float[Tensor, "images in_channels height width"],
        timesteps: Num[Tensor, " images"],
        text_embeddings: Float[Tensor, "batch length text_width"],
        text_mask: Bool[Tensor, "batch length"] | None = None,
        sites: Sites = None,
        reduce: Reduction = "heads",
        rows: slice | None = None,
        edits: Sequence[AnyAttentionEdit] = (),
        shortcuts: Shortcuts | None = None,
        unedited: int = 0,
        also: ExtraWords | None = None,
    ) -> tuple[Float[Tensor, "batch out_channels height width"], AttentionMaps]: ...


@runtime_checkable
class LatentDecoder(Protocol):
    """A VAE's decoder, or what runs one: latents in, images out, as :class:`VAE` says it."""

    @property
    def config(self) -> VAEConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def latents_to_images(
        self, latents: Float[Tensor, "batch latent_channels h w"]
    ) -> Float[Tensor, "batch 3 height width"]: ...

    def latents_to_large_images(
        self, latents: Float[Tensor, "batch latent_channels h w"], tile: int = 64, overlap: int = 16
    ) -> Float[Tensor, "batch 3 height width"]: ...


@runtime_checkable
class PaintingNetworks(Protocol):
    """A model, as far as an engine is concerned: the networks that it runs."""

    @property
    def unet(self) -> UNet: ...

    @property
    def vae(self) -> VAE: ...


@runtime_checkable
class Engine(Protocol):
    """An engine: a U-Net that predicts and a VAE that decodes, with the weights that the model has at each call."""

    name: ClassVar[EngineName]

    @property
    def unet(self) -> NoisePredictor: ...

    @property
    def vae(self) -> LatentDecoder: ...


class UNetRunner:
    """A U-Net that is run in another way, and says of itself what the U-Net says."""

    def __init__(self, unet: UNet):
        self._unet = unet

    @property
    def config(self) -> UNetConfig:
        """The U-Net's configuration."""
        return self._unet.config

    @property
    def attention_sites(self) -> tuple[AttentionSite, ...]:
        """The U-Net's attention sites."""
        return self._unet.attention_sites

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self._unet.dtype


class DecoderRunner:
    """A VAE whose decoder is run in another way, and that says of itself what the VAE says."""

    def __init__(self, vae: VAE):
        self._vae = vae

    @property
    def config(self) -> VAEConfig:
        """The VAE's configuration."""
        return self._vae.config

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self._vae.dtype
