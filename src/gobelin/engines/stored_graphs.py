"""Graphs that are stored: exported and compiled once, then loaded from the user's cache folder by every process."""

import hashlib
import platform
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import gobelin
from gobelin.cache_folder import cache_folder, hashed, is_whole, keep_newest
from gobelin.engine_names import EngineName
from gobelin.engines.engine import PaintingNetworks
from gobelin.engines.graph_networks import Compile, GraphUNet, GraphVAE, RunGraph, describe_inputs

MOST_BYTES = 20 * 10**9
"""The most that an engine keeps on disk: some ten graphs of Stable Diffusion 1.5 in bfloat16."""


class StoredGraphEngine(ABC):
    """An engine whose graphs are files; a subclass says how one is compiled into a file, and how that is loaded."""

    name: ClassVar[EngineName]
    suffix: ClassVar[str]

    def __init__(self, model: PaintingNetworks):
        self._unet = GraphUNet(self.name, model.unet, self._compiled)
        self._vae = GraphVAE(self.name, model.vae, self._compiled)

    @classmethod
    def of(cls, model: PaintingNetworks) -> Self:
        """Make an engine of a model's networks; raises :class:`UsageError` where it cannot run them."""
        return cls(model)

    @property
    def unet(self) -> GraphUNet:
        """The U-Net, with the weights that it has now: a painting asks for it once."""
        return self._unet.looking_closely()

    @property
    def vae(self) -> GraphVAE:
        """The VAE, with the weights that it has now."""
        return self._vae.looking_closely()

    @abstractmethod
    def compile_into(self, file: Path, graph: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        """Compile a graph for the shapes of its inputs, and write it."""

    @abstractmethod
    def load(self, file: Path, inputs: Mapping[str, Tensor]) -> RunGraph:
        """Load a graph that was written; a hash follows it in the file."""

    @abstractmethod
    def describe(self, inputs: Mapping[str, Tensor]) -> str:
        """Describe all that a compiled graph depends on beside the graph: versions, machine, precision."""

    def _compiled(self, wanted: Compile) -> RunGraph:
        """Load a graph from the cache folder, where it is compiled first unless it is there, whole."""
        parts = (
            f"gobelin {gobelin.__version__}, torch {torch.__version__}, {platform.machine()} {platform.system()}",
            self.describe(wanted.inputs),
            str(wanted.graph),
            describe_inputs(wanted.inputs),
            wanted.weights.fingerprint(),
        )
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        try:
            folder = cache_folder(self.name)
        except OSError as error:
            warnings.warn(f"the engine {self.name} compiles anew, as nothing can be kept: {error}", stacklevel=2)
            with tempfile.TemporaryDirectory(prefix="gobelin-") as temporary:
                return self._loaded(Path(temporary) / f"{name}{self.suffix}", wanted)
        run = self._loaded(folder / f"{name}{self.suffix}", wanted)
        keep_newest(folder, MOST_BYTES)
        return run

    def _loaded(self, file: Path, wanted: Compile) -> RunGraph:
        if file.exists() and not is_whole(file):
            warnings.warn(f"{file} is damaged, or others may write to it: it is compiled anew", stacklevel=2)
            file.unlink()
        if not file.exists():
            with hashed(file) as made:
                self.compile_into(made, wanted.graph, wanted.inputs)
        file.touch()
        return self.load(file, wanted.inputs)


def export_graph(graph: nn.Module, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    """Export a graph for the shapes of its inputs, which keep their names (``torch.export``)."""
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        return torch.export.export(graph, (), dict(inputs), strict=False)
