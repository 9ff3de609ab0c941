"""Training: from scratch, stage by stage, or from a model."""

from gobelin.training.config import FineTuneConfig, TrainConfig
from gobelin.training.presets import TRAINING_PRESETS, find_preset

__all__ = ["TRAINING_PRESETS", "FineTuneConfig", "TrainConfig", "find_preset"]
