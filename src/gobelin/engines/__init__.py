"""Engines: what runs a model's networks while it paints. Each gives the same images, up to rounding, in its own time.

``eager`` is PyTorch as it is; ``int8`` is the same with products of whole numbers of 8 bits, whose rounding is seen;
``compiled`` is what TorchInductor makes of the networks, and ``openvino`` what Intel's OpenVINO does. Choose one by
:meth:`gobelin.Pipeline.use` or ``--engine``.
"""

from collections.abc import Callable
from typing import get_args

from gobelin.engine_names import EngineName
from gobelin.engines.eager import EagerEngine
from gobelin.engines.engine import Engine, LatentDecoder, NoisePredictor, PaintingNetworks
from gobelin.validation import validated

__all__ = ["ENGINES", "Engine", "EngineName", "LatentDecoder", "NoisePredictor", "PaintingNetworks", "find_engine"]

ENGINES: tuple[str, ...] = get_args(EngineName)
"""The engines by name."""


def find_engine(name: str) -> Callable[[PaintingNetworks], Engine]:
    """Find an engine by its name: a function that makes one of a model's networks.

    Raises :class:`UsageError` with the choices for a name that there is not, and for what is not installed.
    """
    validated("engine", name, EngineName)
    if name == "int8":
        from gobelin.engines.int8 import Int8Engine, require_int8

        require_int8()
        return Int8Engine.of
    if name == "compiled":
        from gobelin.engines.torch_compile import CompiledEngine

        return CompiledEngine.of
    if name == "openvino":
        from gobelin.engines.openvino_runtime import OpenVINOEngine, require_openvino

        require_openvino()
        return OpenVINOEngine.of
    return EagerEngine.of
