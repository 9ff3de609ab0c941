"""The eager engine: PyTorch runs the model's own networks, operation by operation."""

from dataclasses import dataclass
from typing import ClassVar, Self

from gobelin.engines.engine import EngineName, PaintingNetworks
from gobelin.unet import UNet
from gobelin.vae import VAE


@dataclass(frozen=True, kw_only=True)
class EagerEngine:
    """Run a model's networks as they are."""

    name: ClassVar[EngineName] = "eager"
    unet: UNet
    vae: VAE

    @classmethod
    def of(cls, model: PaintingNetworks) -> Self:
        """Take the networks of a model."""
        return cls(unet=model.unet, vae=model.vae)
