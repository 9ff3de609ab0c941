"""Files of Stable Diffusion 1.x as people have them: every kind that opens, and every kind that is refused.

``tests/checkpoint/test_compatibility.py`` opens them, and ``scripts/site/compatibility.py`` writes the table of
``docs/compatibility.md`` from the same list. Weights are those of diffusers' networks with random values; names are
mapped by the table that diffusers' own converters confirm (``test_loading.py``).
"""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.oracles import original_weights
from torch import Tensor

from gobelin.formats import ldm

PRECISIONS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
SCALE = 0.25  # of weights in scaled float8: a power of two, so that rounding is float8's alone


@dataclass(frozen=True, kw_only=True)
class Files:
    """What kinds are made of: the oracle, its folder, the tokenizer's folder, and where to write."""

    oracle: Any
    make_oracle: Callable[..., Any]
    words: Path
    folder: Path

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The oracle's weights under the names of the original code."""
        return {name: tensor.to(dtype) for name, tensor in original_weights(self.oracle).items()}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file that opens: how it is written, who writes it, and the options that open it."""

    write: Callable[[Files, torch.dtype], Path]
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    """Fields of the noise schedule that the file says."""
    scaled: bool = False
    noted: bool = False
    channels: int = 4


def _single(files: Files, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = files.folder / "model.safetensors"
    save_file(tensors, path, metadata)
    return path


def _renamed(files: Files, dtype: torch.dtype, **names: str) -> Path:
    """A file whose VAE's attention has other names."""
    tensors = {}
    for name, tensor in files.weights(dtype).items():
        start, attention, rest = name.partition(".mid.attn_1.")
        layer, _, kind = rest.rpartition(".")
        tensors[f"{start}{attention}{names[layer]}.{kind}" if attention else name] = tensor
    return _single(files, tensors)


def _checkpoint(files: Files, dtype: torch.dtype, nested: bool = False) -> Path:
    path = files.folder / "model.ckpt"
    weights = files.weights(dtype)
    torch.save({"state_dict": weights, "epoch": 3} if nested else weights, path)
    return path


def _without(files: Files, dtype: torch.dtype, prefix: str) -> dict[str, Tensor]:
    return {name: one for name, one in files.weights(dtype).items() if not name.startswith(prefix)}


def _averaged(files: Files, dtype: torch.dtype, beside: bool) -> Path:
    """A file that has the average of the U-Net's weights, alone or ``beside`` other ones."""
    tensors = {}
    for name, tensor in files.weights(dtype).items():
        if name.startswith(ldm.UNET_PREFIX):
            tensors[ldm.map_ema_key(name)] = tensor
            if beside:
                tensors[name] = torch.zeros_like(tensor)
        else:
            tensors[name] = tensor
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return _single(files, tensors | counters)


def _leftovers(files: Files, dtype: torch.dtype) -> Path:
    """What trainers and other tools leave beside the weights."""
    text = ldm.TEXT_PREFIX
    return _single(
        files,
        files.weights(dtype)
        | {
            "betas": (torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).to(dtype),
            "alphas_cumprod_prev": torch.ones(1000),
            "denoiser.sigmas": torch.ones(1000),
            "first_stage_model.loss.logvar": torch.ones(()),
            "cond_stage_model.logit_scale": torch.ones(()),
            f"{text}text_projection.weight": torch.ones(4, 4),
            f"{text}vision_model.post_layernorm.weight": torch.ones(4),
            f"{text}text_model.embeddings.position_ids": torch.arange(16)[None],
        },
    )


def _vae_beside(files: Files, dtype: torch.dtype, form: str) -> Path:
    """A file without a VAE, and the VAE's own beside it."""
    own = {name: one for name, one in files.weights(dtype).items() if name.startswith(ldm.VAE_PREFIX)}
    bare = {name.removeprefix(ldm.VAE_PREFIX): one for name, one in own.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(840_000)}
    vae = {
        "prefixed": own,
        "bare": bare,
        "averaged": bare | counters | {"loss.logvar": torch.zeros(())},
        "diffusers": {name: one.to(dtype) for name, one in files.oracle.vae.state_dict().items()},
        "whole": files.weights(dtype),
    }[form]
    save_file(vae, files.folder / "vae.safetensors")
    return _single(files, _without(files, dtype, ldm.VAE_PREFIX))


def _marked(files: Files, dtype: torch.dtype) -> Path:
    return _single(files, files.weights(dtype) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})


def _with_yaml(files: Files, dtype: torch.dtype) -> Path:
    (files.folder / "model.yaml").write_text(
        'model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: "v"\n'
        "    linear_start: 0.00085\n    linear_end: 0.0120\n    timesteps: 1000\n    scale_factor: 0.18215\n"
        "    unet_config:\n      params: {num_heads: 8, context_dim: 768}\n"
    )
    return _single(files, files.weights(dtype))


def _scaled(files: Files, dtype: torch.dtype, suffix: str, marker: dict[str, Tensor]) -> Path:
    """The U-Net's matrices in float8, each with a scale beside it; the rest in float16."""
    tensors: dict[str, Tensor] = dict(marker)
    for name, tensor in files.weights(torch.float32).items():
        if name.startswith(ldm.UNET_PREFIX) and name.endswith(".weight") and tensor.ndim > 1:
            tensors[name] = (tensor / SCALE).to(dtype)
            tensors[name.removesuffix("weight") + suffix] = torch.tensor(SCALE)
        else:
            tensors[name] = tensor.half()
    return _single(files, tensors)


def _folder(files: Files, dtype: torch.dtype, **options: Any) -> Path:
    """A folder as diffusers writes it."""
    written = files.make_oracle(files.oracle.unet.config.in_channels)
    shard = options.pop("shard", None)
    for name in ("unet", "vae", "text_encoder"):
        getattr(written, name).load_state_dict(getattr(files.oracle, name).state_dict())
        getattr(written, name).to(dtype)
    written.save_pretrained(files.folder / "model", **options)
    for name in ("unet", "vae", "text_encoder") if shard else ():
        for file in (
            *(files.folder / "model" / name).glob("*.safetensors"),
            *(files.folder / "model" / name).glob("*.bin"),
        ):
            file.unlink()
        getattr(written, name).save_pretrained(files.folder / "model" / name, max_shard_size=shard, **options)
    return files.folder / "model"


def _older_folder(files: Files, dtype: torch.dtype) -> Path:
    """A folder with older names in the VAE, and a whole CLIP in place of its text encoder, without a prefix."""
    folder = _folder(files, dtype)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(vae)
    for new, name in old.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): one for key, one in tensors.items()}
    save_file(tensors, vae)
    text = folder / "text_encoder" / "model.safetensors"
    beside = {
        "text_projection.weight": torch.ones(4, 4),
        "logit_scale": torch.ones(()),
        "vision_model.post_layernorm.weight": torch.ones(4),
        "text_model.embeddings.position_ids": torch.arange(16)[None],
    }
    save_file({key.removeprefix("text_model."): one for key, one in load_file(text).items()} | beside, text)
    return folder


_NEW_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
_OLD_NAMES = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn", "norm": "group_norm"}
_V = {"prediction_type": "v_prediction"}
_COMFY_QUANT = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)

KINDS: dict[str, Kind] = {
    "single file": Kind(
        write=lambda files, dtype: _single(files, files.weights(dtype)), source="CompVis/stable-diffusion"
    ),
    "single file, text encoder without text_model": Kind(
        write=lambda files, dtype: _single(
            files,
            {
                name.replace(".transformer.text_model.", ".transformer."): one
                for name, one in files.weights(dtype).items()
            },
        ),
        source="transformers 5",
    ),
    "single file, VAE attention to_q": Kind(
        write=lambda files, dtype: _renamed(files, dtype, **_NEW_NAMES),
        source="diffusers #4790, EveryDream2trainer #257",
    ),
    "single file, VAE attention query": Kind(
        write=lambda files, dtype: _renamed(files, dtype, **_OLD_NAMES), source="diffusers before 0.17"
    ),
    "single file, leftovers of training": Kind(write=_leftovers, source="A1111 #6728, CompVis, open_clip"),
    "single file, EMA beside": Kind(
        write=lambda files, dtype: _averaged(files, dtype, True), source="CompVis", options={"ema": True}
    ),
    "single file, EMA alone": Kind(
        write=lambda files, dtype: _averaged(files, dtype, False), source="CompVis", options={"ema": True}
    ),
    "single file, inpainting": Kind(
        write=lambda files, dtype: _single(files, files.weights(dtype)), source="runwayml", channels=9
    ),
    "single file, v_pred and ztsnr": Kind(
        write=_marked, source="ComfyUI nodes_model_merging.py", schedule=_V | {"rescale_betas_zero_snr": True}
    ),
    "single file, ModelSpec's prediction_type": Kind(
        write=lambda files, dtype: _single(files, files.weights(dtype), {"modelspec.prediction_type": "v"}),
        source="kohya-ss/sd-scripts sai_model_spec.py",
        schedule=_V,
    ),
    "single file, ModelSpec's predict_key": Kind(
        write=lambda files, dtype: _single(files, files.weights(dtype), {"modelspec.predict_key": "v"}),
        source="ComfyUI nodes_model_merging.py",
        schedule=_V,
    ),
    "single file, .yaml beside": Kind(write=_with_yaml, source="CompVis, webui-forge #1109", schedule=_V),
    "single file, prediction type given": Kind(
        write=lambda files, dtype: _single(files, files.weights(dtype)),
        source="stable-diffusion.cpp #325",
        options={"prediction_type": "v_prediction", "zero_terminal_snr": True},
        schedule=_V | {"rescale_betas_zero_snr": True},
    ),
    "single file, scaled float8": Kind(
        write=lambda files, dtype: _scaled(
            files, dtype, "scale_weight", {f"{ldm.UNET_PREFIX}scaled_fp8": torch.zeros(2).to(dtype)}
        ),
        source="ComfyUI comfy/utils.py",
        scaled=True,
    ),
    "single file, quantized float8": Kind(
        write=lambda files, dtype: _scaled(
            files, dtype, "weight_scale", {f"{ldm.UNET_PREFIX}input_blocks.0.0.comfy_quant": _COMFY_QUANT}
        ),
        source="ComfyUI comfy/utils.py",
        scaled=True,
        noted=True,
    ),
    ".ckpt": Kind(write=_checkpoint, source="CompVis", options={"allow_pickle": True}),
    ".ckpt, under state_dict": Kind(
        write=lambda files, dtype: _checkpoint(files, dtype, True),
        source="pytorch_lightning",
        options={"allow_pickle": True},
    ),
    **{
        f"no VAE, {form} VAE file given": Kind(
            write=lambda files, dtype, form=form: _vae_beside(files, dtype, form), source=source, options={"vae": True}
        )
        for form, source in {
            "prefixed": "CompVis",
            "bare": "webui-forge #512, A1111 #6528",
            "averaged": "A1111 modules/sd_vae.py (vae_ignore_keys)",
            "diffusers": "diffusers",
            "whole": "A1111",
        }.items()
    },
    "folder": Kind(write=_folder, source="diffusers"),
    "folder, variant": Kind(
        write=lambda files, dtype: _folder(files, dtype, variant="half"),
        source="diffusers",
        options={"variant": "half"},
    ),
    "folder, shards": Kind(write=lambda files, dtype: _folder(files, dtype, shard="200KB"), source="diffusers"),
    "folder, .bin": Kind(
        write=lambda files, dtype: _folder(files, dtype, safe_serialization=False),
        source="diffusers",
        options={"allow_pickle": True},
    ),
    "folder, .bin in shards": Kind(
        write=lambda files, dtype: _folder(files, dtype, safe_serialization=False, shard="200KB"),
        source="diffusers",
        options={"allow_pickle": True},
    ),
    "folder, older names and a whole CLIP": Kind(write=_older_folder, source="diffusers before 0.17, transformers 4"),
    "folder, inpainting": Kind(write=_folder, source="diffusers", channels=9),
}


def dtypes_of(kind: Kind) -> list[str]:
    """The precisions that a kind is written in: scaled weights are float8, of one kind where a note says so."""
    if kind.scaled:
        return ["float8_e4m3fn"] if kind.noted else ["float8_e4m3fn", "float8_e5m2"]
    return list(PRECISIONS)


_ROUNDED: dict[tuple[Any, ...], Any] = {}


def rounded(oracle: Any, make_oracle: Callable[..., Any], dtype: torch.dtype, scaled: bool) -> Any:
    """The oracle whose weights went through a precision, in float32; each made once."""
    key = (oracle.unet.config.in_channels, dtype, scaled)
    if key not in _ROUNDED:
        _ROUNDED[key] = _round(oracle, make_oracle, dtype, scaled)
    return _ROUNDED[key]


def _round(oracle: Any, make_oracle: Callable[..., Any], dtype: torch.dtype, scaled: bool) -> Any:
    other = make_oracle(oracle.unet.config.in_channels)
    for name in ("unet", "vae", "text_encoder"):
        state = getattr(oracle, name).state_dict()
        for key, tensor in state.items():
            if not scaled:
                state[key] = tensor.to(dtype).float()
            elif name == "unet" and key.endswith(".weight") and tensor.ndim > 1:
                state[key] = (tensor / SCALE).to(dtype).float() * SCALE
            else:
                state[key] = tensor.half().float()
        getattr(other, name).load_state_dict(state)
    return other


# What people have under a model's name, as bytes or as tensors, and what the sentence says of it.
_HEADER = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
_WHOLE = struct.pack("<Q", len(_HEADER)) + _HEADER + bytes(16)

FOREIGN_FILES: dict[str, tuple[bytes, str]] = {
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265146304\n",
        "a pointer of Git LFS",
    ),
    "login page": (b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>", "a web page"),
    "XML error": (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
    "JSON error": (b'{"error":"Unauthorized","message":"log in to download it"}', "it says 'log in to download it'"),
    "JSON of another kind": (b'[{"a": 1}]', "is JSON, not weights"),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 10, 2) + bytes(200), "a GGUF"),
    "ONNX": (b"\x08\x08\x12\x07pytorch" + bytes(100), "an ONNX model"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(100), r"an image \(PNG\)"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(100), r"an image \(JPEG\)"),
    "WebP": (b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(100), r"an image \(WebP\)"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(100), "a 7z archive: unpack it first"),
    "tar": (b"model" + bytes(252) + b"ustar" + bytes(300), "a tar archive: unpack it first"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "compressed by gzip"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "nothing": (b"", "empty: it has no bytes"),
    "zeros": (bytes(5000), "zeros at its start: the download did not finish"),
    "cut": (_WHOLE[:-5], r"bytes of the \d+ that its header says: it was cut"),
    "cut in its header": (_WHOLE[:20], "it was cut, or is no such file"),
    "too long": (_WHOLE + bytes(16), "16 bytes follow its last tensor"),
    "PyTorch before 1.6": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + bytes(50), "a pickle of PyTorch before 1.6"),
}

# The name of some tensor in a file of another kind, and what the sentence says of it.
FOREIGN_TENSORS: dict[str, tuple[str, str]] = {
    "Stable Diffusion XL": ("conditioner.embedders.0.transformer.x", "is Stable Diffusion XL"),
    "Stable Diffusion XL, diffusers": ("add_embedding.linear_1.weight", "is Stable Diffusion XL"),
    "Stable Diffusion 3": ("model.diffusion_model.joint_blocks.0.x", "is Stable Diffusion 3"),
    "Flux": ("double_blocks.0.img_attn.qkv.weight", "is Flux"),
    "PixArt": ("adaln_single.linear.weight", "is PixArt"),
    "Stable Diffusion 2.x": ("cond_stage_model.model.ln_final.weight", r"is Stable Diffusion 2\.x"),
    "ControlNet": ("control_model.input_blocks.0.0.weight", "is a ControlNet"),
    "ControlNet, diffusers": ("controlnet_cond_embedding.conv_in.weight", "is a ControlNet"),
    "ControlNet-LLLite": ("lllite_unet_input_blocks_4_1.down.0.weight", "is a ControlNet-LLLite"),
    "T2I-Adapter": ("body.0.block1.weight", "a T2I-Adapter or an upscaler"),
    "T2I-Adapter, diffusers": ("adapter.body.0.resnets.0.block1.weight", "a T2I-Adapter"),
    "IP-Adapter": ("ip_adapter.1.to_k_ip.weight", "is an IP-Adapter"),
    "AnimateDiff": ("down_blocks.0.motion_modules.0.norm.weight", "is AnimateDiff's motion module"),
    "Stable Video Diffusion": ("model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight", "Stable Video"),
    "GLIGEN": ("model.diffusion_model.position_net.linears.0.weight", "is GLIGEN"),
    "LCM": ("model.diffusion_model.time_embed.cond_proj.weight", "an LCM that takes its guidance as an input"),
    "ESRGAN": ("params_ema.body.0.rdb1.conv1.weight", "is an upscaler"),
    "upscaler": ("conv_first.weight", "an upscaler"),
    "TAESD": ("decoder.layers.0.weight", "TAESD"),
    "bitsandbytes": ("model.diffusion_model.out.2.weight.quant_state.bitsandbytes__nf4", "quantized by bitsandbytes"),
    "LoRA, kohya": ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "is a LoRA"),
    "LoRA, PEFT": ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "is a LoRA"),
    "LoHa": ("lycoris_mid_block_attentions_0_proj_in.hada_w1_a", "is a LyCORIS"),
    "textual inversion": ("emb_params", "is a textual inversion"),
    "VAE": ("encoder.down.0.block.0.norm1.weight", "it is a VAE: give it as vae"),
    "VAE, prefixed": ("first_stage_model.encoder.conv_in.weight", "it is a VAE: give it as vae"),
    "VAE, diffusers": ("encoder.down_blocks.0.resnets.0.norm1.weight", "it is a VAE"),
    "VAE decoder": ("decoder.up.0.block.0.norm1.weight", "the decoder of a VAE alone"),
    "U-Net, diffusers": ("down_blocks.0.resnets.0.norm1.weight", "the U-Net of a diffusers folder"),
    "U-Net alone": ("input_blocks.0.0.weight", "a U-Net alone"),
    "text encoder": ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder"),
    "image encoder": ("vision_model.post_layernorm.weight", "the image encoder of a CLIP"),
    "unknown": ("weight", "it is of no known kind"),
}


def copy_tokenizer(files: Files) -> None:
    """Put the tokenizer beside a single file, where it is looked for."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(files.words / name, files.folder / name)
