"""Our own engines as contenders: those of ``gobelin.engines``, beside the networks called directly."""

from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from gobelin.bench.random_weights import random_unet
from gobelin.unet import UNet
from gobelin.vae import VAE, VAEConfig

_PACKAGE = "gobelin.engines"
_DIRECT = "eager"


def our_engines() -> tuple[str, ...]:
    """Name the engines that there are, but the one that calls the networks as they are."""
    if find_spec(_PACKAGE) is None:
        return ()
    return tuple(name for name in import_module(_PACKAGE).ENGINES if name != _DIRECT)


def run_by(engine: str, unet: UNet | None = None, vae: VAE | None = None) -> Any:
    """Give networks to an engine; returns what has ``unet`` and ``vae`` that are called as they are.

    One that is not given is a small one, which nothing is asked of.
    """
    model = SimpleNamespace(
        unet=random_unet("nano", vae.dtype) if unet is None and vae is not None else unet,
        vae=VAE(VAEConfig.nano()) if vae is None else vae,
    )
    return import_module(_PACKAGE).find_engine(engine)(model)
