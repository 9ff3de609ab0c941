"""The compiled engine: TorchInductor compiles the networks to C++ ahead of time, with weights laid out for the CPU.

A graph that is kept is code that will run: it is only read from a folder that nobody else can write to.
"""

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gobelin.engine_names import EngineName
from gobelin.engines.graph_networks import RunGraph
from gobelin.engines.stored_graphs import StoredGraphEngine, export_graph


class CompiledEngine(StoredGraphEngine):
    """Run networks that TorchInductor has compiled, one library for each shape of inputs."""

    name: ClassVar[EngineName] = "compiled"
    suffix: ClassVar[str] = ".pt2"

    def compile_into(self, file: Path, graph: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        """Compile ahead of time (AOTInductor); raises RuntimeError where there is no compiler."""
        from torch._inductor import aoti_compile_and_package, config

        if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
            raise RuntimeError("there is no C++ compiler, g++ or clang++")
        program = export_graph(graph, inputs)
        # Frozen weights are constants: they can be laid out for the kernels that read them.
        with torch.no_grad(), warnings.catch_warnings(action="ignore"), config.patch(freezing=True):
            aoti_compile_and_package(program, package_path=str(file))

    def load(self, file: Path, inputs: Mapping[str, Tensor]) -> RunGraph:
        """Load a library; it is unpacked into a temporary folder as long as it is used."""
        from torch._inductor import aoti_load_package

        with warnings.catch_warnings(action="ignore"):
            compiled: Any = aoti_load_package(str(file))

        def run(given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return tuple(compiled(**{name: tensor.contiguous() for name, tensor in given.items()}))

        return run

    def describe(self, inputs: Mapping[str, Tensor]) -> str:
        """Describe the machine that is compiled for, and the threads, whose number is part of the code."""
        device = next(iter(inputs.values())).device
        if device.type == "cuda":
            return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
        machine = getattr(torch.cpu, "get_capabilities", dict)()
        return f"{device} {machine} {torch.get_num_threads()} threads"
