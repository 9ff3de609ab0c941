"""LoRA files (Hu et al. 2021, arXiv 2106.09685) in the layouts of kohya's sd-scripts, of diffusers, PEFT and ComfyUI.

A file holds two matrices ``down`` (A) and ``up`` (B) of a small rank for each layer that it changes, and perhaps an
``alpha``: the layer's weight gains ΔW = up · down · alpha / rank. LyCORIS' LoHa and LoKr have other matrices
(:mod:`gobelin.formats.weight_deltas`) under the same names of layers. Names are mapped forward from Gobelin's module
names, as kohya's, in which dots became underscores, cannot be mapped back. Which names mean a layer is taken from
ComfyUI's ``comfy/lora.py`` (``model_lora_keys_unet``, ``model_lora_keys_clip``).
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gobelin.errors import ModelError
from gobelin.formats.families import named_family
from gobelin.formats.files import parse_json, read_json
from gobelin.formats.ldm import UNET_PREFIX, map_unet_keys
from gobelin.formats.tensor_file import TensorFile
from gobelin.formats.textual_inversion import checked_vectors, find_vectors
from gobelin.formats.weight_deltas import DELTA_TENSORS, WeightDelta, make_delta
from gobelin.formats.weights import and_more, open_tensors
from gobelin.validation import shown

PEFT_METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings
# ``lora_te1_`` as for two encoders; ``lycoris_`` by LyCORIS' ``create_lycoris``, which SimpleTuner calls.
KOHYA_PREFIXES = {"unet": ("lora_unet_", "lycoris_"), "text_encoder": ("lora_te_", "lora_te1_", "lycoris_")}
PEFT_PREFIX = "base_model.model."
_FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")
_MAX_PATTERN = 200  # characters
_MAX_ALPHA = 1e6
_BUNDLED = "bundle_emb."  # embeddings that come with a LoRA (AUTOMATIC1111's ``extensions-builtin/Lora/networks.py``)

_ROLES = re.compile(
    r"(?P<base>.*?)(?:"
    rf"\.(?P<kohya>{'|'.join(map(re.escape, DELTA_TENSORS))})"
    r"|\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|(?:\.lora|\.lora_linear_layer|(?P<processor>_lora))\.(?P<diffusers>down|up)\.weight"
    r"|\.(?P<alpha>alpha)"
    r")$"
)
# Parts of names, and the kind of a file that has them, as LyCORIS, PEFT (``prefix`` in ``tuners/*/model.py``) and
# cloneofsimo's lora name them.
_OTHER_KINDS = (
    (re.compile(r"base_model\.model\..*\.hada_"), "a LoHa in PEFT's layout"),
    (re.compile(r"base_model\.model\..*\.lokr_"), "a LoKr in PEFT's layout"),
    (re.compile(r"\.dora_scale$|lora_magnitude"), "a DoRA"),
    (re.compile(r"\.diff(_b)?$"), "a file of full differences of weights"),
    (re.compile(r"\.[wb]_norm$"), "a file of differences of norms"),
    (re.compile(r"\.on_input$|[._]ia3_"), "an IA3"),
    (re.compile(r"\.[ab][12]\.weight$|[._]glora_"), "a GLoRA"),
    (re.compile(r"[._]boft_"), "a BOFT"),
    (re.compile(r"[._]oft_|^oft_"), "an OFT"),
    (re.compile(r"[._]vera_lambda_"), "a VeRA"),
    (re.compile(r"lora_embedding_[AB]"), "a LoRA of the token embeddings"),
    (re.compile(r"(lora_[AB](\.\w+)?|lora_up|lora_down)\.bias$"), "a LoRA with biases"),
    (re.compile(r"^(unet|text_encoder):\d+:(up|down)$"), "a LoRA whose layers have numbers and no names"),
)
# Beginnings of names, by family.
_FAMILY_MARKS = {
    "Flux": ("lora_unet_double_blocks_", "lora_unet_single_blocks_", "transformer.single_transformer_blocks."),
    "Stable Diffusion 3": ("lora_unet_joint_blocks_", "transformer.transformer_blocks.", "lora_transformer_"),
    "Stable Diffusion XL": ("lora_te2_", "text_encoder_2.", "lora_unet_label_emb", "lora_unet_add_embedding"),
}
_CONTEXT = re.compile(
    r"attn2[._](?:processor\.)?to_[kv](?:_lora)?\."
    r"(?:(?:lora_down|lora_A(?:\.\w+)?|down|lora\.down)\.weight|hada_w1_b)$"
)
_FAMILY_CONTEXTS = {1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}  # widths of text embeddings


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file's content: deltas by network ("unet", "text_encoder") and module, and embeddings by word."""

    deltas: dict[str, dict[str, WeightDelta]]
    embeddings: dict[str, Tensor]


def read_lora(path: Path, modules: Mapping[str, Iterable[str]], allow_pickle: bool = False) -> LoraFile:
    """Read a LoRA file, or PEFT's folder of one, for the ``modules`` of each network.

    Raises :class:`ModelError` that names the first tensor that belongs to no module, lacks its counterpart, or is of
    another kind of adapter, the family that a file is of, and for a file without tensors.
    """
    if path.is_dir():
        path = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), path / _FOLDER_FILES[0])
    file = open_tensors(path, allow_pickle)
    bundled = [name for name in file.shapes if name.startswith(_BUNDLED)]
    names = [name for name in file.shapes if not name.startswith(_BUNDLED)]
    if (family := _find_family(file)) is not None:
        raise ModelError(f"{path} is a LoRA of {family}, and this model is of Stable Diffusion 1.x")
    for mark, kind in _OTHER_KINDS:
        if found := [name for name in names if mark.search(name)]:
            raise ModelError(f"{path} is {kind} ({shown(found[0])}), and only LoRAs, LoHas and LoKrs can be added")
    places = {
        name: (network, module)
        for network, layers in modules.items()
        for module, its_names in layer_names(network, list(layers)).items()
        for name in its_names
    }
    roles: dict[tuple[str, str], dict[str, str]] = {}
    unknown = []
    for name in names:
        role = _ROLES.match(name)
        base = (role["base"] + (role["processor"] or "")) if role else name
        if role is None or base not in places:
            unknown.append(name)
            continue
        way = {"A": "down", "B": "up"}.get(role["peft"]) or role["diffusers"]
        kind = role["kohya"] or (f"lora_{way}.weight" if way else "alpha")
        if (other := roles.setdefault(places[base], {}).setdefault(kind, name)) != name:
            raise ModelError(f"{path} holds {shown(other)} and {shown(name)}, which are for one layer")
    if unknown:
        what = "no layer of this model" if roles else "no layer of this model, like all others in this file"
        raise ModelError(f"{path} holds {shown(unknown[0])}{and_more(unknown)}, which belongs to {what}")
    if not roles and not bundled:
        raise ModelError(f"{path} is not a LoRA: it holds no tensors")
    tensors, settings = file.read(names), _peft_settings(file)
    deltas: dict[str, dict[str, WeightDelta]] = {}
    for (network, module), found in roles.items():
        here = {kind: tensors[name] for kind, name in found.items()}
        alpha = _read_alpha(path, found["alpha"], here.pop("alpha")) if "alpha" in found else None
        delta = make_delta(path, found, here)
        scale = _scale(path, delta.rank, alpha, module, settings.get(network, {}))
        deltas.setdefault(network, {})[module] = replace(delta, scale=scale)
    return LoraFile(deltas=deltas, embeddings=_read_bundled(file, bundled))


def _read_bundled(file: TensorFile, names: Iterable[str]) -> dict[str, Tensor]:
    """Read the embeddings that come with a LoRA: ``bundle_emb.WORD.`` and what an embedding's own file would have."""
    by_word: dict[str, dict[str, str]] = {}
    for name in names:
        word, _, key = name.removeprefix(_BUNDLED).partition(".")
        by_word.setdefault(word, {})[key] = name
    embeddings = {}
    for word, keys in by_word.items():
        name = keys[find_vectors(keys, file.path)]
        embeddings[word] = checked_vectors(file.read([name])[name], name, file.path)
    return embeddings


def _find_family(file: TensorFile) -> str | None:
    """Find the family of models that a file was made for, by names, metadata and widths; None for 1.x, or unknown."""
    for family, marks in _FAMILY_MARKS.items():
        if any(name.startswith(marks) for name in file.shapes):
            return family
    if (named := named_family(file.metadata)) is not None:
        return named
    widths = {shape[1] for name, shape in file.shapes.items() if len(shape) > 1 and _CONTEXT.search(name)}
    return next((family for width, family in _FAMILY_CONTEXTS.items() if widths == {width}), None)


def _read_alpha(path: Path, name: str, tensor: Tensor) -> float:
    """Read an alpha; raises :class:`ModelError` for what is not one finite number."""
    value = float(tensor.item()) if tensor.numel() == 1 else None
    if value is None or not abs(value) < _MAX_ALPHA:
        came = f"of the shape {list(tensor.shape)}" if value is None else shown(value)
        raise ModelError(f"{path}: {name!r} is {came}, expected a number")
    return value


def layer_names(network: str, modules: Collection[str]) -> dict[str, list[str]]:
    """List the names of each layer of a network in every layout, up to the role of the tensor."""
    originals: dict[str, str] = {}
    if network == "unet" and (blocks := [name for name in modules if name.startswith("down_blocks.0.resnets.")]):
        layers = 1 + max(int(name.split(".")[3]) for name in blocks)
        mapped = map_unet_keys([f"{module}.weight" for module in modules], layers)
        originals = {key.removesuffix(".weight"): name.removesuffix(".weight") for key, name in mapped.items()}
    return {module: _names_of_layer(network, module, originals.get(module)) for module in modules}


def _names_of_layer(network: str, module: str, original: str | None) -> list[str]:
    """List the names of one layer; ``original`` is the one in the original code, with its prefix."""
    names = [module] if network == "unet" else [module, module.removeprefix("text_model.")]
    prefixes = (f"{network}.", "", PEFT_PREFIX, f"{network}.{PEFT_PREFIX}")
    dotted = [f"{prefix}{name}" for name in names for prefix in prefixes]
    if found := re.fullmatch(r"(.*\.attn[12])\.(to_[qkv]|to_out)(?:\.0)?", module):
        dotted += [f"{prefix}{found[1]}.processor.{found[2]}_lora" for prefix in (f"{network}.", "")]
    for prefix in KOHYA_PREFIXES[network]:
        dotted += [prefix + module.replace(".", "_"), f"{prefix[:-1]}.{module}"]
    if original is not None:
        plain = original.removeprefix(UNET_PREFIX)
        dotted += [f"diffusion_model.{plain}", f"lora_unet_{plain.replace('.', '_')}"]
    return list(dict.fromkeys(dotted))


def _peft_settings(file: TensorFile) -> dict[str, dict[str, Any]]:
    """Read PEFT's settings by network: from the metadata, where diffusers wrote them, or from the file beside.

    Raises :class:`ModelError` for a file with PEFT's names alone and without settings, which hold the alpha.
    """
    if PEFT_METADATA_KEY in file.metadata:
        source = f"{file.path}: its {PEFT_METADATA_KEY}"
        settings = parse_json(file.metadata[PEFT_METADATA_KEY], source)
        plain = {name: value for name, value in settings.items() if "." not in name}
        return {
            network: plain
            | {
                name.removeprefix(f"{network}."): one
                for name, one in settings.items()
                if name.startswith(f"{network}.")
            }
            for network in KOHYA_PREFIXES
        }
    if not any(name.startswith(PEFT_PREFIX) for name in file.shapes):
        return {}
    beside = file.path.with_name("adapter_config.json")
    if not beside.exists() and any(name.endswith(".alpha") for name in file.shapes):
        return {}
    return dict.fromkeys(KOHYA_PREFIXES, read_json(beside))


def _scale(path: Path, rank: int | None, alpha: float | None, module: str, settings: Mapping[str, Any]) -> float:
    """Compute alpha / rank (rsLoRA: alpha / √rank); 1 where nothing says an alpha, or nothing has a rank."""
    if alpha is None:
        patterns = settings.get("alpha_pattern") or {}
        named = patterns.items() if isinstance(patterns, dict) else ()
        alpha = next((one for name, one in named if _is_for(path, name, module)), settings.get("lora_alpha"))
    if alpha is None or rank is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _MAX_ALPHA:
        raise ModelError(f"{path}: the alpha of {module} is {shown(alpha)}, expected a number")
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def _is_for(path: Path, pattern: str, module: str) -> bool:
    """Match a module by a key of PEFT's patterns (``tuners_utils.py``, ``get_pattern_key``), a regular expression.

    Raises :class:`ModelError` for one that could take long to match: with groups, or more than two repetitions.
    """
    if len(pattern) > _MAX_PATTERN or re.search(r"[^\w.*+\\\[\]-]", pattern) or len(re.findall(r"[*+]", pattern)) > 2:
        raise ModelError(f"{path}: its alpha_pattern has {shown(pattern)}, expected the name of a layer")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise ModelError(f"{path}: its alpha_pattern has {shown(pattern)}, which is no pattern: {error}") from error
