"""LoRAs (Hu et al. 2021, arXiv 2106.09685) of a model: added and removed, several at once, each with its own weight.

LyCORIS' LoHas and LoKrs are added in the same way; all are called LoRAs here, as in prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gobelin.adapters.learned_words import LearnedWords
from gobelin.errors import ModelError, UsageError
from gobelin.formats.lora_layouts import read_lora
from gobelin.formats.weight_deltas import WeightDelta
from gobelin.validation import shown

_GENERIC_NAMES = ("pytorch_lora_weights", "adapter_model")  # which diffusers and PEFT give to every file
_MAX_WEIGHT = 1e6


@dataclass(frozen=True, kw_only=True)
class _LoadedLora:
    """A LoRA's deltas by network and module, its weight, and the words that came with it."""

    deltas: dict[str, dict[str, WeightDelta]]
    weight: float
    words: list[str] = field(default_factory=list)


def _check_weight(weight: float) -> None:
    """Raise :class:`UsageError` for what is no number, NaN and infinity."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < _MAX_WEIGHT:
        raise UsageError(f"the weight of a LoRA is {shown(weight)}: give a number")


@dataclass(repr=False)
class Loras:
    """The LoRAs of a model, which change its ``networks`` ("unet", "text_encoder").

    Each changed layer gets the weight W + Σ weight · ΔW and its own W is kept aside, so that removing a LoRA restores
    the layer bit for bit. Layers stay ordinary ones: tracing and controls need to know nothing of LoRAs. Embeddings
    that come with a LoRA are words as long as it is loaded, whatever its weight.
    """

    networks: Mapping[str, nn.Module]
    learned: LearnedWords
    _loaded: dict[str, _LoadedLora] = field(default_factory=dict)
    _originals: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def add(self, path: Path, weight: float = 1.0, name: str | None = None, allow_pickle: bool = False) -> str:
        """Add a LoRA file at ``weight`` (1 is as it was trained) and return its name: ``name``, or the file's stem; of
        a second file of the one name that diffusers or PEFT give to every file, its folder's.

        Raises :class:`ModelError` that names the first tensor that does not fit, and :class:`UsageError` for a name
        that is taken or a weight that is no number; the model is then as it was.
        """
        if name is None:
            name = path.stem
            if name in self._loaded and name in _GENERIC_NAMES:
                name = path.resolve().parent.name
        _check_weight(weight)
        if name in self._loaded:
            raise UsageError(f"a LoRA {name!r} is loaded already: give this one another name, or remove the other")
        layers = {
            network: [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
            for network, module in self.networks.items()
        }
        file = read_lora(path, layers, allow_pickle)
        for network, of_network in file.deltas.items():
            for module, delta in of_network.items():
                self._check_shape(path, network, module, delta)
        self.learned.add(file.embeddings, path)
        self._loaded[name] = _LoadedLora(deltas=file.deltas, weight=weight, words=list(file.embeddings))
        self._apply(file.deltas)
        return name

    def set_weight(self, name: str, weight: float) -> None:
        """Set the weight of a loaded LoRA: 0 is without it, 1 as it was trained."""
        _check_weight(weight)
        self._loaded[name] = replace(self._find(name), weight=weight)
        self._apply(self._loaded[name].deltas)

    def remove(self, name: str) -> None:
        """Remove a loaded LoRA, and the words that came with it."""
        lora = self._find(name)
        del self._loaded[name]
        self._apply(lora.deltas)
        self.learned.remove(lora.words)

    def require_fuse(self, fuse_loras: bool) -> None:
        """Raise :class:`UsageError` if LoRAs are loaded and ``fuse_loras`` does not ask to save the model with them.

        Layers hold the changed weights, so a model that is saved now would have its LoRAs for good.
        """
        if self._loaded and not fuse_loras:
            loaded = ", ".join(f"{name!r} at {lora.weight:g}" for name, lora in self._loaded.items())
            raise UsageError(
                f"this model has LoRAs loaded ({loaded}): save with fuse_loras=True to write them into its weights for "
                "good, or remove them first"
            )

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move the weights that are kept aside to where the model was moved."""
        self._originals = {key: weight.to(device, dtype) for key, weight in self._originals.items()}

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the loaded LoRAs by name."""
        return {name: lora.weight for name, lora in self._loaded.items()}

    def __repr__(self) -> str:
        return f"Loras({self.weights})"

    def _layer(self, network: str, module: str) -> nn.Linear | nn.Conv2d:
        layer = self.networks[network].get_submodule(module)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return layer

    def _find(self, name: str) -> _LoadedLora:
        if name not in self._loaded:
            raise UsageError(f"no LoRA {name!r} is loaded: the loaded ones are {', '.join(self._loaded) or 'none'}")
        return self._loaded[name]

    def _check_shape(self, path: Path, network: str, module: str, delta: WeightDelta) -> None:
        """Raise :class:`ModelError` for a delta that is not of its layer's shape; a linear layer counts as 1×1."""
        weight = self._layer(network, module).weight
        if not delta.fits(tuple(weight.shape)):
            raise ModelError(
                f"{path} is for another model: {module} is {list(weight.shape)} here, and the {delta.kind} changes "
                f"one of {list(delta.shape())}"
            )

    @torch.no_grad()
    def _apply(self, deltas: Mapping[str, Mapping[str, WeightDelta]]) -> None:
        """Compute the weights of the layers that these deltas change anew, from the layers' originals."""
        for network, of_network in deltas.items():
            for module in of_network:
                layer = self._layer(network, module)
                original = self._originals.setdefault((network, module), layer.weight.detach())
                weight = original.float()
                loras = [lora for lora in self._loaded.values() if module in lora.deltas.get(network, {})]
                for lora in loras:
                    delta = lora.deltas[network][module].delta_weight()
                    weight = weight + lora.weight * delta.reshape(weight.shape).to(weight.device)
                layer.weight = nn.Parameter(weight.to(original.dtype) if loras else original, requires_grad=False)
                if not loras:
                    del self._originals[network, module]
