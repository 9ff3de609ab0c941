"""Adding LoRAs to a model and taking them out again, several at once, each with a weight of its own."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gobelin.errors import ModelError, UsageError
from gobelin.formats.lora_layouts import Change, read_lora


@dataclass(frozen=True, kw_only=True)
class _Added:
    changes: dict[str, dict[str, Change]]
    weight: float


def _refuse_odd(weight: float) -> None:
    if not math.isfinite(weight):
        raise UsageError(f"the weight of a LoRA is {weight}: give a number")


@dataclass
class Loras:
    """The LoRAs of a model whose ``parts`` ("unet", "text_encoder") they change.

    The layers' own weights are kept aside, so that taking a LoRA out, or giving it another weight, leaves no trace of
    what was. What computes are ordinary layers with changed weights: nothing that looks into them notices.
    """

    parts: Mapping[str, nn.Module]
    _added: dict[str, _Added] = field(default_factory=dict)
    _before: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def add(self, path: Path, weight: float = 1.0, name: str | None = None, allow_pickle: bool = False) -> str:
        """Add a file's LoRA and return what it goes by: ``name``, or the file's own.

        Raises :class:`ModelError` that names what of the file does not fit, and :class:`UsageError` for a name that is
        taken; the model is then as it was.
        """
        name = name or path.stem
        _refuse_odd(weight)
        if name in self._added:
            raise UsageError(f"a LoRA {name!r} is there already: give this one another name, or take the other out")
        layers = {
            part: [where for where, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
            for part, network in self.parts.items()
        }
        changes = read_lora(path, layers, allow_pickle)
        for part, of_part in changes.items():
            for where, change in of_part.items():
                self._refuse_misfit(path, part, where, change)
        self._added[name] = _Added(changes=changes, weight=weight)
        self._apply(changes)
        return name

    def set_weight(self, name: str, weight: float) -> None:
        """Give a LoRA another weight: 0 for none of it, 1 for as much as it was trained for."""
        _refuse_odd(weight)
        changes = self._find(name).changes
        self._added[name] = _Added(changes=changes, weight=weight)
        self._apply(changes)

    def remove(self, name: str) -> None:
        """Take a LoRA out."""
        changes = self._find(name).changes
        del self._added[name]
        self._apply(changes)

    def merge(self) -> None:
        """Make what was added the model's own: it cannot be taken out any more, and takes no memory."""
        self._added.clear()
        self._before.clear()

    @property
    def weights(self) -> dict[str, float]:
        """What is added, and how much of it."""
        return {name: added.weight for name, added in self._added.items()}

    def _layer(self, part: str, where: str) -> nn.Linear | nn.Conv2d:
        layer = self.parts[part].get_submodule(where)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return layer

    def _find(self, name: str) -> _Added:
        if name not in self._added:
            raise UsageError(f"no LoRA {name!r} was added: there is {', '.join(self._added) or 'none'}")
        return self._added[name]

    def _refuse_misfit(self, path: Path, part: str, where: str, change: Change) -> None:
        weight = self._layer(part, where).weight
        given, wanted = (shape + (1,) * (4 - len(shape)) for shape in (change.shape(), tuple(weight.shape)))
        if given != wanted:
            raise ModelError(
                f"{path} is for another model: {where} is {list(weight.shape)} here, and the LoRA has "
                f"{list(change.up.shape)} times {list(change.down.shape)} for it"
            )

    @torch.no_grad()
    def _apply(self, changes: Mapping[str, Mapping[str, Change]]) -> None:
        """Compute the weights of the layers that these changes concern anew, from what they were before any."""
        for part, of_part in changes.items():
            for where in of_part:
                layer = self._layer(part, where)
                before = self._before.setdefault((part, where), layer.weight.detach())
                weight = before.float()
                now = [added for added in self._added.values() if where in added.changes.get(part, {})]
                for added in now:
                    change = added.changes[part][where].weight()
                    weight = weight + added.weight * change.reshape(weight.shape).to(weight.device)
                layer.weight = nn.Parameter(weight.to(before.dtype) if now else before, requires_grad=False)
                if not now:
                    del self._before[part, where]
