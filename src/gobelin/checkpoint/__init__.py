"""Checkpoints: models from diffusers folders, single files and the Hub's cache, and back into folders and files."""

from gobelin.checkpoint.loading import open_model
from gobelin.checkpoint.model import Model, Recommended

__all__ = ["Model", "Recommended", "open_model"]
