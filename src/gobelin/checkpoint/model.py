"""What a model is made of."""

from dataclasses import dataclass, field

from gobelin.clip import TextEncoder
from gobelin.schedule import NoiseSchedule
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet
from gobelin.vae import VAE


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """How a model asks to be sampled; read from ``gobelin.json`` where its folder has one."""

    sampler: str = "dpmpp_2m"
    steps: int = 25
    guidance: float = 7.5
    guidance_rescale: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Model:
    """Three networks, with the tokenizer and the noise schedule that they were trained with.

    ``world`` names the world of scenes that they know, where they were trained on one.
    """

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    recommended: Recommended = field(default_factory=Recommended)
    world: str | None = None
    name: str = ""
