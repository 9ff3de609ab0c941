"""Models on disk in the shapes that people have them in, and back: diffusers folders, single files, the Hub's cache."""

from gobelin.checkpoint.loading import open_model
from gobelin.checkpoint.model import Model, Recommended

__all__ = ["Model", "Recommended", "open_model"]
