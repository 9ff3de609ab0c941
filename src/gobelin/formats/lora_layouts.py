"""LoRA files (Hu et al. 2021, arXiv 2106.09685) in the layouts of kohya's sd-scripts, of diffusers and of PEFT.

A file has, for each layer that it changes, two matrices ``down`` and ``up`` of a small rank, and perhaps an ``alpha``:
the layer's weight gains up · down · alpha / rank. Names are mapped forward from Gobelin's module names, as kohya's, in
which dots became underscores, cannot be mapped back.
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

UNET, TEXT = "unet", "text_encoder"
ADAPTER_METADATA = "lora_adapter_metadata"  # the key under which diffusers keeps PEFT's settings

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
class Change:
    """What a LoRA adds to one layer's weight: up · (mid) · down · scale."""

    down: Tensor
    up: Tensor
    mid: Tensor | None
    scale: float

    def shape(self) -> tuple[int, ...]:
        """The shape of :meth:`weight`, without computing it."""
        middle = self.down if self.mid is None else self.mid
        return (len(self.up), self.down.shape[1], *middle.shape[2:])

    def weight(self) -> Tensor:
        """The change, float32, as a convolution's weight [out, in, height, width] or a linear layer's [out, in]."""
        down, up = self.down.float(), self.up.float()
        if self.mid is not None:
            return self.scale * torch.einsum("or,rshw,si->oihw", up.flatten(1), self.mid.float(), down.flatten(1))
        changed = self.scale * up.flatten(1) @ down.flatten(1)
        return changed.reshape(len(up), *down.shape[1:])


def read_lora(
    path: Path, modules: Mapping[str, Iterable[str]], allow_pickle: bool = False
) -> dict[str, dict[str, Change]]:
    """The changes in a file by part ("unet", "text_encoder") and module, of those ``modules`` that each part has.

    Raises :class:`ModelError` that names the first tensor which belongs to no module, lacks its counterpart, or is of
    another kind of adapter; and for a file that changes nothing.
    """
    file = open_tensors(path, allow_pickle)
    for mark, kind in _OTHER_KINDS.items():
        if found := [name for name in file.shapes if mark in name]:
            raise ModelError(f"{path} is {kind} ({found[0]}), and only plain LoRAs can be added")
    places = {
        name: (part, module) for part, names in modules.items() for module in names for name in _bases(part, module)
    }
    roles: dict[tuple[str, str], dict[str, str]] = {}
    strangers = []
    for name in file.shapes:
        role = _ROLES.match(name)
        base = (role["base"] + (role["processor"] or "")) if role else name
        if role is None or base not in places:
            strangers.append(name)
            continue
        kind = role["kohya"] or {"A": "down", "B": "up"}.get(role["peft"] or "") or role["diffusers"] or "alpha"
        roles.setdefault(places[base], {})[kind] = name
    if strangers:
        what = "no layer of this model" if roles else "no layer of this model, as all in this file"
        raise ModelError(f"{path} holds {strangers[0]!r}{and_more(strangers)}, which is of {what}")
    for found in roles.values():
        if missing := {"down", "up"} - found.keys():
            raise ModelError(f"{path} lacks the {min(missing)} that goes with {min(found.values())!r}")
    if not roles:
        raise ModelError(f"{path} is not a LoRA: it holds no tensors")
    tensors, said = file.read(), _said(file)
    changes: dict[str, dict[str, Change]] = {}
    for (part, module), found in roles.items():
        here = {kind: tensors[name] for kind, name in found.items()}
        _refuse_odd(path, found, here)
        alpha = here["alpha"].item() if "alpha" in here else None
        changes.setdefault(part, {})[module] = Change(
            down=here["down"],
            up=here["up"],
            mid=here.get("mid"),
            scale=_scale(file, len(here["down"]), alpha, part, module, said),
        )
    return changes


def _refuse_odd(path: Path, names: Mapping[str, str], here: Mapping[str, Tensor]) -> None:
    """Raise :class:`ModelError` for tensors that are not numbers, or no matrices of one rank."""
    for kind, tensor in here.items():
        if not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise ModelError(f"{path}: {names[kind]!r} holds NaN or infinity: the file is damaged, or its training was")
    down, up, mid = here["down"], here["up"], here.get("mid")
    matrices = down.ndim in (2, 4) and up.ndim in (2, 4) and down.numel() and up.numel()
    fits = matrices and up.shape[1] == len(down) and set(up.shape[2:]) <= {1}
    if mid is not None:
        fits = fits and mid.ndim == 4 and mid.shape[:2] == (len(down), len(down)) and set(down.shape[2:]) <= {1}
    if not fits or ("alpha" in here and here["alpha"].numel() != 1):
        said = ", ".join(f"{names[kind]!r} {list(tensor.shape)}" for kind, tensor in here.items())
        raise ModelError(f"{path} holds tensors that make no change of one rank together: {said}")


def _bases(part: str, module: str) -> list[str]:
    """All that a layer is called in the layouts, up to the role of the tensor."""
    kohya = {UNET: "lora_unet_", TEXT: "lora_te_"}[part]
    names = [module] if part == UNET else [module, module.removeprefix("text_model.")]
    dotted = [f"{prefix}{name}" for name in names for prefix in (f"{part}.", "", "base_model.model.")]
    if found := re.fullmatch(r"(.*\.attn[12])\.(to_[qkv]|to_out)(?:\.0)?", module):
        dotted += [f"{prefix}{found[1]}.processor.{found[2]}_lora" for prefix in (f"{part}.", "")]
    return [kohya + module.replace(".", "_"), *dotted]


def _said(file: TensorFile) -> dict[str, Any]:
    """PEFT's settings, where diffusers wrote them into the file."""
    return parse_json(file.metadata.get(ADAPTER_METADATA, "{}"), f"{file.path}: its {ADAPTER_METADATA}")


def _scale(file: TensorFile, rank: int, alpha: float | None, part: str, module: str, said: dict[str, Any]) -> float:
    """alpha / rank, and 1 where alpha is not said, or 0."""
    if alpha is None:
        patterns = said.get(f"{part}.alpha_pattern") or {}
        named = patterns.items() if isinstance(patterns, dict) else ()
        alpha = next((one for name, one in named if module.endswith(name)), said.get(f"{part}.lora_alpha"))
    if not alpha:
        return 1.0
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{file.path}: the alpha of {module} is {alpha!r}, expected a number")
    return float(alpha) / (rank**0.5 if said.get(f"{part}.use_rslora") else rank)
