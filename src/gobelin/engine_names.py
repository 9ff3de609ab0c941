"""The names of the engines, apart from :mod:`gobelin.engines`, so that help can list them without PyTorch."""

from typing import Literal

EngineName = Literal["eager", "int8", "compiled", "openvino"]
"""The names of the engines."""
