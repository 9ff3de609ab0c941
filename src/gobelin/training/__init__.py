"""Training from scratch: tokenizer, text encoder, VAE, U-Net."""

from gobelin.training.config import TRAINING_PRESETS, TrainConfig, find_preset

__all__ = ["TRAINING_PRESETS", "TrainConfig", "find_preset"]
