"""Training: from scratch, stage by stage, or from a model."""

from gobelin.training.config import TrainConfig
from gobelin.training.fine_tune_config import FineTuneConfig
from gobelin.training.presets import TRAINING_PRESETS, find_preset

__all__ = ["TRAINING_PRESETS", "FineTuneConfig", "TrainConfig", "find_preset"]
