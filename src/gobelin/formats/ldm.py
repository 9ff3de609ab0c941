"""State-dict keys of the original latent-diffusion (LDM) code's single files, and configurations read off their shapes.

Keys are mapped forward only, from Gobelin's (which are diffusers') to CompVis', after
``ldm/modules/diffusionmodules/openaimodel.py`` and ``model.py`` in CompVis/stable-diffusion.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
EMA_PREFIX = "model_ema."
# Keys that change no image: the schedule's tables, training's leftovers, what CLIP has beside its text encoder.
IGNORED_KEYS = re.compile(
    r"(betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights|denoiser\.sigmas"
    r"|(first_stage_model\.)?(model_ema|loss)\..*"
    r"|cond_stage_model\.(transformer\.)?(text_model\.)?"
    r"(logit_scale|text_projection(\.weight)?|visual_projection\.weight|vision_model\..*|embeddings\.position_ids)"
    r"|.*\.(scale_input|input_scale)|(model\.diffusion_model\.|cond_stage_model\.transformer\.)?scaled_fp8)$"
)

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# What the VAE's attention is called in files of converters that knew diffusers' newer or older names, but not LDM's.
_VAE_ATTENTION_ALIASES = {**_VAE_ATTENTION, "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}


def normalize_key(name: str) -> str:
    """Return LDM's key for a key of a single file, whose text encoder and VAE may have other tools' names.

    ``text_model.`` is put where it is left out, and the VAE's attention has one of three sets of names.
    """
    if name.startswith(TEXT_PREFIX):
        return f"{TEXT_PREFIX}text_model.{name.removeprefix(TEXT_PREFIX).removeprefix('text_model.')}"
    start, attention, rest = name.partition(".mid.attn_1.")
    layer, _, kind = rest.rpartition(".")
    return f"{start}{attention}{_VAE_ATTENTION_ALIASES.get(layer, layer)}.{kind}" if attention else name


def map_unet_keys(keys: Collection[str], layers: int) -> dict[str, str]:
    """Map a U-Net's state-dict keys to LDM's, with their prefix; ``layers`` is ``layers_per_block``."""
    attends = {int(key.split(".")[1]) for key in keys if re.match(r"up_blocks\.\d+\.attentions\.", key)}

    def resnet(part: str) -> str:
        layer, _, kind = part.rpartition(".")
        return f"{_RESNET[layer]}.{kind}"

    def down(match: re.Match[str]) -> str:
        level, layer = int(match[1]), int(match[3])
        if match[2] == "downsamplers":
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{match[4].removeprefix('conv.')}"
        block = f"input_blocks.{1 + level * (layers + 1) + layer}"
        return f"{block}.0.{resnet(match[4])}" if match[2] == "resnets" else f"{block}.1.{match[4]}"

    def up(match: re.Match[str]) -> str:
        position, layer = int(match[1]), int(match[3])
        if match[2] == "upsamplers":
            return f"output_blocks.{position * (layers + 1) + layers}.{2 if position in attends else 1}.{match[4]}"
        block = f"output_blocks.{position * (layers + 1) + layer}"
        return f"{block}.0.{resnet(match[4])}" if match[2] == "resnets" else f"{block}.1.{match[4]}"

    def middle(match: re.Match[str]) -> str:
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{resnet(match[3])}"

    table: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"time_embedding\.linear_1\.(.*)", r"time_embed.0.\1"),
        (r"time_embedding\.linear_2\.(.*)", r"time_embed.2.\1"),
        (r"conv_in\.(.*)", r"input_blocks.0.0.\1"),
        (r"conv_norm_out\.(.*)", r"out.0.\1"),
        (r"conv_out\.(.*)", r"out.2.\1"),
        (r"down_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", down),
        (r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", up),
        (r"mid_block\.(\w+)\.(\d+)\.(.*)", middle),
    ]
    return {key: UNET_PREFIX + _rewrite(table, key) for key in keys}


def map_vae_keys(keys: Collection[str], levels: int) -> dict[str, str]:
    """Map a VAE's state-dict keys to LDM's, with their prefix; ``levels`` is ``len(block_out_channels)``."""

    def block(match: re.Match[str]) -> str:
        half, direction, number, kind, layer, rest = match.groups()
        level = number if direction == "down" else str(levels - 1 - int(number))
        if kind == "resnets":
            return f"{half}.{direction}.{level}.block.{layer}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{half}.{direction}.{level}.{kind.removesuffix('rs')}.{rest}"

    def resnet(match: re.Match[str]) -> str:
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"

    def attention(match: re.Match[str]) -> str:
        return f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"

    table: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"(\w+)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", block),
        (r"(\w+)\.mid_block\.resnets\.(\d)\.(.*)", resnet),
        (r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", attention),
        (r"(\w+)\.conv_norm_out\.(.*)", r"\1.norm_out.\2"),
        (r"(.*)", r"\1"),
    ]
    return {key: VAE_PREFIX + _rewrite(table, key) for key in keys}


def diffusers_vae_keys(keys: Mapping[str, str]) -> dict[str, str]:
    """Map the names in a file of diffusers' VAE to LDM's keys; ``keys`` are their state-dict keys."""
    originals = map_vae_keys(keys.values(), len(_indices(keys, r"encoder\.down_blocks\.(\d+)\.")))
    return {name: originals[key] for name, key in keys.items()}


def map_text_keys(keys: Collection[str]) -> dict[str, str]:
    """Map a text encoder's state-dict keys to LDM's, with their prefix."""
    return {key: TEXT_PREFIX + key for key in keys}


def map_ema_key(original: str) -> str:
    """Map an LDM key of the U-Net to that of its exponential moving average (EMA): no dot but the first."""
    return EMA_PREFIX + original.removeprefix("model.").replace(".", "")


def is_vae_attention_weight(original: str) -> bool:
    """Recognise the LDM key of a weight in the VAE's attention: a 1×1 convolution there, a linear layer here."""
    return bool(re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", original))


def infer_unet_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer a U-Net's configuration from its tensors' shapes by LDM key, all but heads and groups."""
    blocks = _indices(shapes, UNET_PREFIX + r"input_blocks\.(\d+)\.")
    downsamplers = _indices(shapes, UNET_PREFIX + r"input_blocks\.(\d+)\.0\.op\.")
    layers = (downsamplers[0] if downsamplers else len(blocks)) - 1
    firsts = [1 + level * (layers + 1) for level in range(len(downsamplers) + 1)]
    attends = [f"{UNET_PREFIX}input_blocks.{first}.1.norm.weight" in shapes for first in firsts]
    context = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    return {
        "in_channels": shapes[f"{UNET_PREFIX}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET_PREFIX}out.2.weight"][0],
        "block_out_channels": tuple(
            shapes[f"{UNET_PREFIX}input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts
        ),
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
        "cross_attention_dim": context,
    }


def infer_vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer a VAE's configuration from its tensors' shapes by LDM key."""
    levels = _indices(shapes, VAE_PREFIX + r"encoder\.down\.(\d+)\.")
    return {
        "block_out_channels": tuple(
            shapes[f"{VAE_PREFIX}encoder.down.{level}.block.0.conv2.weight"][0] for level in levels
        ),
        "layers_per_block": len(_indices(shapes, VAE_PREFIX + r"encoder\.down\.0\.block\.(\d+)\.")),
        "in_channels": shapes[f"{VAE_PREFIX}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{VAE_PREFIX}decoder.conv_out.weight"][0],
        "latent_channels": shapes[f"{VAE_PREFIX}decoder.conv_in.weight"][1],
        "mid_block_add_attention": any(name.startswith(f"{VAE_PREFIX}encoder.mid.attn_1.") for name in shapes),
    }


def infer_text_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer a text encoder's configuration, all but its heads, from its tensors' shapes; keys have ``text_model.``."""
    start = f"{TEXT_PREFIX}text_model."
    vocab_size, width = shapes[f"{start}embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes[f"{start}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(_indices(shapes, re.escape(start) + r"encoder\.layers\.(\d+)\.")),
        "max_position_embeddings": shapes[f"{start}embeddings.position_embedding.weight"][0],
    }


def _indices(shapes: Iterable[str], pattern: str) -> list[int]:
    """List, sorted, the distinct numbers that a pattern's group finds in the keys."""
    return sorted({int(found[1]) for name in shapes if (found := re.match(pattern, name))})


def _rewrite(table: list[tuple[str, str | Callable[[re.Match[str]], str]]], key: str) -> str:
    """Rewrite a key by the first pattern of the table that matches all of it."""
    for pattern, replacement in table:
        if found := re.fullmatch(pattern, key):
            return found.expand(replacement) if isinstance(replacement, str) else replacement(found)
    raise KeyError(key)
