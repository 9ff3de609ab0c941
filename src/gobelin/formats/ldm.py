"""The single files of the original latent-diffusion code: what each tensor is called there, and what they hold.

Names are mapped forward only, from Gobelin's (which are diffusers') to those of CompVis' code. The facts are those of
``ldm/modules/diffusionmodules/openaimodel.py`` and ``model.py`` in CompVis/stable-diffusion.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
EMA = "model_ema."
# What such files hold beside the weights: the schedule's tables, training's leftovers, parts that painting never uses.
PASSED_OVER = re.compile(
    r"(betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights"
    r"|model_ema\..*|first_stage_model\.loss\..*|loss\..*"
    r"|cond_stage_model\.(logit_scale|text_projection|transformer\.(text_model\.)?embeddings\.position_ids))$"
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


def unet_names(keys: Collection[str], layers: int) -> dict[str, str]:
    """The original name, with its prefix, of each of a U-Net's tensors; ``layers`` as in its configuration."""
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
    return {key: UNET + _first(table, key) for key in keys}


def vae_names(keys: Collection[str], levels: int) -> dict[str, str]:
    """The original name, with its prefix, of each of a VAE's tensors; ``levels`` is how many widths it has."""

    def block(match: re.Match[str]) -> str:
        half, way, number, what, layer, rest = match.groups()
        level = number if way == "down" else str(levels - 1 - int(number))
        if what == "resnets":
            return f"{half}.{way}.{level}.block.{layer}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{half}.{way}.{level}.{what.removesuffix('rs')}.{rest}"

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
    return {key: VAE + _first(table, key) for key in keys}


def text_names(keys: Collection[str]) -> dict[str, str]:
    """The original name, with its prefix, of each of a text encoder's tensors."""
    return {key: TEXT + key for key in keys}


def ema_name(original: str) -> str:
    """What the average of a U-Net's tensor is called: all dots but the first are gone."""
    return EMA + original.removeprefix("model.").replace(".", "")


def is_vae_attention(original: str) -> bool:
    """Whether a tensor is one of the VAE's attention's, whose linear layers are 1×1 convolutions there."""
    return bool(re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", original))


def unet_shape(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of a U-Net's configuration that its tensors' shapes tell; heads and groups are not among them."""
    numbers = _numbers(shapes, UNET + r"input_blocks\.(\d+)\.")
    halvings = _numbers(shapes, UNET + r"input_blocks\.(\d+)\.0\.op\.")
    layers = (halvings[0] if halvings else len(numbers)) - 1
    firsts = [1 + level * (layers + 1) for level in range(len(halvings) + 1)]
    attends = [f"{UNET}input_blocks.{first}.1.norm.weight" in shapes for first in firsts]
    context = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    return {
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": tuple(shapes[f"{UNET}input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts),
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
        "cross_attention_dim": context,
    }


def vae_shape(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of a VAE's configuration that its tensors' shapes tell."""
    levels = _numbers(shapes, VAE + r"encoder\.down\.(\d+)\.")
    return {
        "block_out_channels": tuple(shapes[f"{VAE}encoder.down.{level}.block.0.conv2.weight"][0] for level in levels),
        "layers_per_block": len(_numbers(shapes, VAE + r"encoder\.down\.0\.block\.(\d+)\.")),
        "in_channels": shapes[f"{VAE}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{VAE}decoder.conv_out.weight"][0],
        "latent_channels": shapes[f"{VAE}post_quant_conv.weight"][0],
        "mid_block_add_attention": f"{VAE}encoder.mid.attn_1.q.weight" in shapes,
    }


def text_shape(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of a text encoder's configuration that its tensors' shapes tell; names have ``text_model.``."""
    start = f"{TEXT}text_model."
    vocabulary, width = shapes[f"{start}embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{start}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(_numbers(shapes, re.escape(start) + r"encoder\.layers\.(\d+)\.")),
        "max_position_embeddings": shapes[f"{start}embeddings.position_embedding.weight"][0],
    }


def _numbers(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> list[int]:
    return sorted({int(found[1]) for name in shapes if (found := re.match(pattern, name))})


def _first(table: list[tuple[str, str | Callable[[re.Match[str]], str]]], key: str) -> str:
    """The key rewritten by the first pattern of the table that matches all of it."""
    for pattern, replacement in table:
        if found := re.fullmatch(pattern, key):
            return found.expand(replacement) if isinstance(replacement, str) else replacement(found)
    raise KeyError(key)
