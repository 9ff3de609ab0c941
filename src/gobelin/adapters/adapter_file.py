"""Trained adapters written as other programs read them: in the layouts of kohya's sd-scripts, of diffusers and of PEFT.

:func:`gobelin.formats.lora_layouts.read_lora` reads all three.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gobelin.adapters.adapter_settings import AdapterConfig, AdapterLayout
from gobelin.adapters.trainable import adapter_config, adapter_deltas
from gobelin.errors import UsageError
from gobelin.formats.files import write_json
from gobelin.formats.lora_layouts import KOHYA_PREFIXES, PEFT_METADATA_KEY, PEFT_PREFIX
from gobelin.formats.weight_deltas import LoraDelta, WeightDelta
from gobelin.formats.weights import write_tensors
from gobelin.validation import validated

_KIND_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}


def write_adapter(
    path: Path,
    networks: Mapping[str, nn.Module],
    layout: AdapterLayout = "kohya",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the adapters of ``networks`` ("unet", "text_encoder") to a ``.safetensors`` file, atomically.

    With the layout "peft", ``path`` is a folder of ``adapter_model.safetensors`` and ``adapter_config.json``, of a
    U-Net alone. ``metadata`` goes into the file's header, beside what the layout's own programs write there and not in
    its place. Raises :class:`UsageError` for a network without adapters, for two of different kinds, and for a LoHa or
    LoKr in another layout than kohya's.
    """
    layout = validated("layout", layout, AdapterLayout)
    if unknown := networks.keys() - KOHYA_PREFIXES.keys():
        raise UsageError(f"networks has {min(unknown)!r}: give {' and '.join(KOHYA_PREFIXES)}")
    configs = {name: adapter_config(network) for name, network in networks.items()}
    _check_layout(layout, configs)
    deltas = {name: adapter_deltas(network) for name, network in networks.items()}
    if layout == "kohya":
        write_tensors(path, _kohya_tensors(deltas, configs), {**(metadata or {}), **_kohya_metadata(configs)})
    elif layout == "diffusers":
        settings = {
            f"{name}.{key}": value
            for name, config in configs.items()
            for key, value in _peft_settings(config, deltas[name]).items()
        }
        header = {**(metadata or {}), PEFT_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
        write_tensors(path, _peft_tensors({f"{name}.": found for name, found in deltas.items()}), header)
    else:
        write_tensors(path / "adapter_model.safetensors", _peft_tensors({PEFT_PREFIX: deltas["unet"]}), metadata)
        write_json(path / "adapter_config.json", _peft_settings(configs["unet"], deltas["unet"]))


def _check_layout(layout: AdapterLayout, configs: Mapping[str, AdapterConfig]) -> None:
    """Raise :class:`UsageError` for adapters that the layout cannot hold."""
    kinds = sorted({config.kind for config in configs.values()})
    if len(kinds) != 1:
        raise UsageError(f"the adapters are {' and '.join(kinds) or 'none'}: give one or two networks of one kind")
    if kinds[0] != "lora" and layout != "kohya":
        raise UsageError(
            f"the layout {layout!r} holds no {_KIND_NAMES[kinds[0]]}: write it in the layout 'kohya', which is LyCORIS'"
        )
    if layout == "peft" and configs.keys() != {"unet"}:
        raise UsageError(
            f"the layout 'peft' holds a U-Net's adapter alone, and not {' and '.join(configs)}: write the layout "
            "'diffusers' or 'kohya'"
        )


def _kohya_tensors(
    deltas: Mapping[str, Mapping[str, WeightDelta]], configs: Mapping[str, AdapterConfig]
) -> dict[str, Tensor]:
    """Name the tensors as sd-scripts and LyCORIS do (``networks/lora.py``, ``lycoris/kohya.py``)."""
    named: dict[str, Tensor] = {}
    for network, found in deltas.items():
        for module, delta in found.items():
            base = KOHYA_PREFIXES[network][0] + module.replace(".", "_")
            # without a rank, LyCORIS writes the one that was asked for, as an alpha that changes nothing
            rank = configs[network].rank if delta.rank is None else delta.rank
            named[f"{base}.alpha"] = torch.tensor(delta.scale * rank)
            named |= {f"{base}.{name}": tensor.detach() for name, tensor in delta.tensors().items()}
    return named


def _kohya_metadata(configs: Mapping[str, AdapterConfig]) -> dict[str, str]:
    """Write what sd-scripts' ``train_network.py`` says of a network: its module, arguments, rank and alpha."""
    config = next(iter(configs.values()))
    alpha = config.scale * config.rank
    arguments: dict[str, str] = {} if config.kind == "lora" else {"algo": config.kind}
    if config.targets == "all":
        arguments |= {"conv_dim": str(config.rank), "conv_alpha": str(alpha)}
    if config.kind == "lokr":
        arguments["factor"] = str(config.factor or -1)
    one_size = len({(one.rank, one.scale) for one in configs.values()}) == 1
    return {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora" if config.kind == "lora" else "lycoris.kohya",
        # "Dynamic" as networks/resize_lora.py writes it for ranks that differ
        "ss_network_dim": str(config.rank) if one_size else "Dynamic",
        "ss_network_alpha": str(alpha) if one_size else "Dynamic",
        "ss_network_args": json.dumps(arguments),
    }


def _peft_tensors(deltas: Mapping[str, Mapping[str, WeightDelta]]) -> dict[str, Tensor]:
    """Name the tensors of LoRAs as PEFT does, after the prefix of their network."""
    named: dict[str, Tensor] = {}
    for prefix, found in deltas.items():
        for module, delta in found.items():
            assert isinstance(delta, LoraDelta)
            named[f"{prefix}{module}.lora_A.weight"] = delta.down.detach()
            named[f"{prefix}{module}.lora_B.weight"] = delta.up.detach()
    return named


def _peft_settings(config: AdapterConfig, deltas: Mapping[str, WeightDelta]) -> dict[str, Any]:
    """Write the fields of PEFT's ``LoraConfig`` that say how the tensors are added.

    Newer versions of transformers have no ``text_model.`` in their names, and PEFT compares the ends of names.
    """
    return {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": config.scale * config.rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": [module.removeprefix("text_model.") for module in deltas],
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
