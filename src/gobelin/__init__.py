"""Gobelin: train, run and look inside text-conditioned latent diffusion with a cross-attention U-Net.

The public names are imported when they are first used, so that ``import gobelin`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gobelin import control, guidance, samplers, scenes, training
    from gobelin.checkpoint import Model, open_model
    from gobelin.clip import TextEncoder, TextEncoderConfig
    from gobelin.diffusers_pipelines import look_into
    from gobelin.errors import GobelinError
    from gobelin.painting import Painting, Result
    from gobelin.pipeline import Pipeline
    from gobelin.schedule import NoiseSchedule, ScheduleConfig
    from gobelin.settings import Settings
    from gobelin.tokenizer import Tokenizer
    from gobelin.training import FineTuneConfig, TrainConfig
    from gobelin.training.train_model import train
    from gobelin.unet import UNet
    from gobelin.unet_config import UNetConfig
    from gobelin.vae import VAE, VAEConfig

__version__ = "0.1.0"

_PACKAGES = ("control", "guidance", "samplers", "scenes", "training")
_HOMES = {
    "FineTuneConfig": "training",
    "GobelinError": "errors",
    "Model": "checkpoint",
    "NoiseSchedule": "schedule",
    "Painting": "painting",
    "Pipeline": "pipeline",
    "Result": "painting",
    "ScheduleConfig": "schedule",
    "Settings": "settings",
    "TextEncoder": "clip",
    "TextEncoderConfig": "clip",
    "Tokenizer": "tokenizer",
    "TrainConfig": "training",
    "UNet": "unet",
    "UNetConfig": "unet_config",
    "VAE": "vae",
    "VAEConfig": "vae",
    "look_into": "diffusers_pipelines",
    "open_model": "checkpoint",
    "train": "training.train_model",
}

__all__ = [
    "VAE",
    "FineTuneConfig",
    "GobelinError",
    "Model",
    "NoiseSchedule",
    "Painting",
    "Pipeline",
    "Result",
    "ScheduleConfig",
    "Settings",
    "TextEncoder",
    "TextEncoderConfig",
    "Tokenizer",
    "TrainConfig",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "control",
    "guidance",
    "look_into",
    "open_model",
    "samplers",
    "scenes",
    "train",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"gobelin.{name}")
    if name in _HOMES:
        return getattr(import_module(f"gobelin.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gobelin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
