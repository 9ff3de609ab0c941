"""Checkpoints: models from diffusers folders, single files and the Hub's cache, and back into folders and files."""

from gobelin.checkpoint.loading import open_model
from gobelin.checkpoint.model import Model

__all__ = ["Model", "open_model"]
