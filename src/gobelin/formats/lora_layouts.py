"""LoRA files (Hu et al. 2021, arXiv 2106.09685) in the layouts of kohya's sd-scripts, of diffusers and of PEFT.

A file holds two matrices ``down`` (A) and ``up`` (B) of a small rank for each layer that it changes, and perhaps an
``alpha``: the layer's weight gains ΔW = up · down · alpha / rank. Names are mapped forward from Gobelin's module names,
as kohya's, in which dots became underscores, cannot be mapped back.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gobelin.errors import ModelError
from gobelin.formats.files import parse_json
from gobelin.formats.tensor_file import TensorFile
from gobelin.formats.weights import and_more, open_tensors

_PEFT_METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings
_KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}

_ROLES = re.compile(
    r"(?P<base>.*?)(?:"
    r"\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|(?:\.lora|\.lora_linear_layer|(?P<processor>_lora))\.(?P<diffusers>down|up)\.weight"
    r"|\.(?P<alpha>alpha)"
    r")$"
)
_OTHER_KINDS = {"hada_w": "a LoHa", "lokr_w": "a LoKr", "dora_scale": "a DoRA", "lora_magnitude": "a DoRA"}


@dataclass(frozen=True, kw_only=True)
class LoraDelta:
    """LoRA's change of one layer's weight: ΔW = scale · up · (mid ·) down.

    ``down`` is [rank, in, …], ``up`` [out, rank, …] and ``mid``, of convolutions alone, [rank, rank, height, width].
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None
    scale: float

    def shape(self) -> tuple[int, ...]:
        """Return the shape of :meth:`delta_weight` without computing it."""
        middle = self.down if self.mid is None else self.mid
        return (len(self.up), self.down.shape[1], *middle.shape[2:])

    def delta_weight(self) -> Tensor:
        """Compute ΔW in float32: [out, in] for a linear layer, [out, in, height, width] for a convolution."""
        down, up = self.down.float(), self.up.float()
        if self.mid is not None:
            return self.scale * torch.einsum("or,rshw,si->oihw", up.flatten(1), self.mid.float(), down.flatten(1))
        product = self.scale * up.flatten(1) @ down.flatten(1)
        return product.reshape(len(up), *down.shape[1:])


def read_lora(
    path: Path, modules: Mapping[str, Iterable[str]], allow_pickle: bool = False
) -> dict[str, dict[str, LoraDelta]]:
    """Read a LoRA file: its deltas by network ("unet", "text_encoder") and module, of the ``modules`` of each network.

    Raises :class:`ModelError` that names the first tensor that belongs to no module, lacks its counterpart, or is of
    another kind of adapter; and for a file without tensors.
    """
    file = open_tensors(path, allow_pickle)
    for mark, kind in _OTHER_KINDS.items():
        if found := [name for name in file.shapes if mark in name]:
            raise ModelError(f"{path} is {kind} ({found[0]}), and only plain LoRAs can be added")
    places = {
        name: (network, module)
        for network, names in modules.items()
        for module in names
        for name in _layer_names(network, module)
    }
    roles: dict[tuple[str, str], dict[str, str]] = {}
    unknown = []
    for name in file.shapes:
        role = _ROLES.match(name)
        base = (role["base"] + (role["processor"] or "")) if role else name
        if role is None or base not in places:
            unknown.append(name)
            continue
        kind = role["kohya"] or {"A": "down", "B": "up"}.get(role["peft"] or "") or role["diffusers"] or "alpha"
        roles.setdefault(places[base], {})[kind] = name
    if unknown:
        what = "no layer of this model" if roles else "no layer of this model, like all others in this file"
        raise ModelError(f"{path} holds {unknown[0]!r}{and_more(unknown)}, which belongs to {what}")
    for found in roles.values():
        if missing := {"down", "up"} - found.keys():
            raise ModelError(f"{path} lacks the {min(missing)} that goes with {min(found.values())!r}")
    if not roles:
        raise ModelError(f"{path} is not a LoRA: it holds no tensors")
    tensors, settings = file.read(), _peft_settings(file)
    deltas: dict[str, dict[str, LoraDelta]] = {}
    for (network, module), found in roles.items():
        here = {kind: tensors[name] for kind, name in found.items()}
        _check_matrices(path, found, here)
        alpha = here["alpha"].item() if "alpha" in here else None
        deltas.setdefault(network, {})[module] = LoraDelta(
            down=here["down"],
            up=here["up"],
            mid=here.get("mid"),
            scale=_scale(path, len(here["down"]), alpha, network, module, settings),
        )
    return deltas


def _check_matrices(path: Path, names: Mapping[str, str], here: Mapping[str, Tensor]) -> None:
    """Raise :class:`ModelError` for NaN or infinity, and for shapes that have no rank in common."""
    for kind, tensor in here.items():
        if not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise ModelError(f"{path}: {names[kind]!r} holds NaN or infinity: the file is damaged, or its training was")
    down, up, mid = here["down"], here["up"], here.get("mid")
    matrices = down.ndim in (2, 4) and up.ndim in (2, 4) and down.numel() and up.numel()
    fits = matrices and up.shape[1] == len(down) and set(up.shape[2:]) <= {1}
    if mid is not None:
        fits = fits and mid.ndim == 4 and mid.shape[:2] == (len(down), len(down)) and set(down.shape[2:]) <= {1}
    if not fits or ("alpha" in here and here["alpha"].numel() != 1):
        shapes = ", ".join(f"{names[kind]!r} {list(tensor.shape)}" for kind, tensor in here.items())
        raise ModelError(f"{path} holds tensors whose shapes have no common rank: {shapes}")


def _layer_names(network: str, module: str) -> list[str]:
    """List the names of a layer in every layout, up to the role of the tensor."""
    names = [module] if network == "unet" else [module, module.removeprefix("text_model.")]
    dotted = [f"{prefix}{name}" for name in names for prefix in (f"{network}.", "", "base_model.model.")]
    if found := re.fullmatch(r"(.*\.attn[12])\.(to_[qkv]|to_out)(?:\.0)?", module):
        dotted += [f"{prefix}{found[1]}.processor.{found[2]}_lora" for prefix in (f"{network}.", "")]
    return [_KOHYA_PREFIXES[network] + module.replace(".", "_"), *dotted]


def _peft_settings(file: TensorFile) -> dict[str, Any]:
    """Read PEFT's settings from the metadata where diffusers wrote them; empty without."""
    return parse_json(file.metadata.get(_PEFT_METADATA_KEY, "{}"), f"{file.path}: its {_PEFT_METADATA_KEY}")


def _scale(path: Path, rank: int, alpha: float | None, network: str, module: str, settings: dict[str, Any]) -> float:
    """Compute alpha / rank (rsLoRA: alpha / √rank); 1 where the file has no alpha, or 0."""
    if alpha is None:
        patterns = settings.get(f"{network}.alpha_pattern") or {}
        named = patterns.items() if isinstance(patterns, dict) else ()
        alpha = next((one for name, one in named if module.endswith(name)), settings.get(f"{network}.lora_alpha"))
    if not alpha:
        return 1.0
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{path}: the alpha of {module} is {alpha!r}, expected a number")
    return float(alpha) / (rank**0.5 if settings.get(f"{network}.use_rslora") else rank)
