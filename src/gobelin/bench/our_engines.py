"""Our own engines as contenders: the one that paints where none is named, the others, and networks called directly."""

from types import SimpleNamespace
from typing import Any, cast

from gobelin.bench.random_weights import random_unet
from gobelin.engines import ENGINES, PaintingNetworks, find_engine
from gobelin.unet import UNet
from gobelin.vae import VAE, VAEConfig

DEFAULT = "eager"
"""The engine that paints where none is named."""


ROUNDED = "int8"
"""The engine whose rounding is coarser than that of a model's precision: compared in bfloat16, and passes alone."""


def other_engines() -> tuple[str, ...]:
    """Name the engines that there are beside the default one, and compute what it does."""
    return tuple(name for name in ENGINES if name not in (DEFAULT, ROUNDED))


def run_by(engine: str = DEFAULT, unet: UNet | None = None, vae: VAE | None = None) -> Any:
    """Give networks to an engine; returns what has ``unet`` and ``vae`` that are called as they are.

    One that is not given is a small one, which nothing is asked of.
    """
    model = SimpleNamespace(
        unet=random_unet("nano", vae.dtype) if unet is None and vae is not None else unet,
        vae=VAE(VAEConfig.nano()) if vae is None else vae,
    )
    return find_engine(engine)(cast(PaintingNetworks, model))
