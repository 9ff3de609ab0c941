"""Training from nothing: tokenizer, text encoder, VAE, U-Net."""

from gobelin.training.config import PRESETS, TrainConfig, find_preset

__all__ = ["PRESETS", "TrainConfig", "find_preset"]
