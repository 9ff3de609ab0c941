"""The OpenVINO engine: Intel's runtime runs the networks on the CPU, in the precision of their weights."""

import warnings
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.decomp_utils import CustomDecompTable

from gobelin.cache_folder import DIGEST_BYTES
from gobelin.engine_names import EngineName
from gobelin.engines.engine import PaintingNetworks
from gobelin.engines.graph_networks import RunGraph
from gobelin.engines.stored_graphs import StoredGraphEngine, export_graph
from gobelin.errors import UsageError

_PRECISIONS = {torch.float32: ("FP32", "f32"), torch.bfloat16: ("BF16", "bf16"), torch.float16: ("FP16", "f16")}
"""The names of precisions among a CPU's capabilities, and as a hint of what to compute in."""


class OpenVINOEngine(StoredGraphEngine):
    """Run networks that OpenVINO has converted and compiled, one graph for each shape of inputs."""

    name: ClassVar[EngineName] = "openvino"
    suffix: ClassVar[str] = ".blob"

    def __init__(self, model: PaintingNetworks):
        super().__init__(model)
        self._core = _core()
        capability, hint = _PRECISIONS[model.unet.dtype]
        if capability not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            named = str(model.unet.dtype).removeprefix("torch.")
            warnings.warn(f"OpenVINO does not compute in {named} on this CPU: it computes in float32", stacklevel=4)
            hint = "f32"
        self._hint = hint

    @classmethod
    def of(cls, model: PaintingNetworks) -> Self:
        """Make an engine; raises :class:`UsageError` for networks on other devices than the CPU, and in float64."""
        if model.unet.device.type != "cpu":
            raise UsageError(f"the engine {cls.name} runs on the CPU, and the model is on {model.unet.device}: move it")
        if model.unet.dtype not in _PRECISIONS:
            names = ", ".join(str(one).removeprefix("torch.") for one in _PRECISIONS)
            raise UsageError(f"the engine {cls.name} does not compute in {model.unet.dtype}: the choices are {names}")
        return cls(model)

    def compile_into(self, file: Path, graph: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        """Convert and compile."""
        compiled = self._core.compile_model(self.converted(graph, inputs), "CPU", self._settings())
        file.write_bytes(compiled.export_model().getvalue())

    def converted(self, graph: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        """Convert a graph to OpenVINO's form."""
        return convert_graph(graph, inputs)

    def load(self, file: Path, inputs: Mapping[str, Tensor]) -> RunGraph:
        """Load a graph; its weights stay in the file, from which they are mapped."""
        import openvino

        blob = openvino.Tensor(np.memmap(file, mode="c")[:-DIGEST_BYTES], shared_memory=True)
        compiled = self._core.import_model(blob, "CPU", self._settings())
        request = compiled.create_infer_request()
        lock, kept = Lock(), blob  # from which the graph reads its weights as long as it runs

        def run(given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            assert kept is not None
            with lock:
                request.infer({name: _to_openvino(tensor) for name, tensor in given.items()})
                return tuple(_from_openvino(request.get_output_tensor(index)) for index in range(len(compiled.outputs)))

        return run

    def describe(self, inputs: Mapping[str, Tensor]) -> str:
        """Describe the version, the CPU and the precision."""
        import openvino

        properties = [
            self._core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
        ]
        return f"OpenVINO {openvino.__version__} {properties} {self._hint}"

    def _settings(self) -> dict[str, Any]:
        return {
            "INFERENCE_PRECISION_HINT": self._hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }


@cache
def _core() -> Any:
    """Make OpenVINO's core, one for as long as the process lives.

    Each takes the thread's alternate stack for signals and at its end puts back the one that it found, which may be
    that of another that has ended: the next signal, a Ctrl-C, would end the process (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def require_openvino() -> None:
    """Raise :class:`UsageError` where OpenVINO is not installed."""
    if find_spec("openvino") is None:
        raise UsageError("the engine openvino needs OpenVINO: pip install 'gobelin[openvino]'")


def convert_graph(graph: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Convert a graph to OpenVINO's form for the shapes of its inputs, which keep their names.

    By OpenVINO's front end for PyTorch itself: ``openvino.convert_model`` would report each conversion to its makers.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose

    kept = CustomDecompTable()
    for operator in ops_to_not_decompose():
        if operator in kept:
            kept.pop(operator)
    program = export_graph(graph, inputs)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        decoder = TorchFXPythonDecoder(program.run_decompositions(kept).module())
    front_end = FrontEndManager().load_by_framework("pytorch")
    loaded = front_end.load(decoder)  # holds no reference to the decoder, which has to outlive it
    return front_end.convert(loaded)


def _to_openvino(tensor: Tensor) -> Any:
    """Share a tensor's memory with OpenVINO; NumPy has no bfloat16, which passes as bits."""
    import openvino

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.int16).numpy()
        return openvino.Tensor(bits, openvino.Shape(list(tensor.shape)), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def _from_openvino(tensor: Any) -> Tensor:
    """Copy one of OpenVINO's tensors."""
    import openvino

    if tensor.element_type == openvino.Type.bf16:
        return torch.from_numpy(tensor.data.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(tensor.data.copy())
