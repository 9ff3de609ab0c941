"""Which family of models a file or folder is of, so that what cannot be opened is refused by its name."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gobelin.errors import ModelError

ONLY = "Gobelin opens Stable Diffusion 1.x"

# What gives a single file away: a part of some tensor's name, and what such a file is.
_MARKS = (
    ("lora_unet_", "a LoRA: open a model, and add it with load_lora"),
    ("lora_te_", "a LoRA: open a model, and add it with load_lora"),
    (".lora_A.", "a LoRA: open a model, and add it with load_lora"),
    (".lora.down.", "a LoRA: open a model, and add it with load_lora"),
    (".lora_down.", "a LoRA: open a model, and add it with load_lora"),
    ("_lora.down.", "a LoRA: open a model, and add it with load_lora"),
    ("string_to_param", "a textual inversion: open a model, and add it with load_textual_inversion"),
    ("emb_params", "a textual inversion: open a model, and add it with load_textual_inversion"),
    ("conditioner.embedders.", f"Stable Diffusion XL; {ONLY}"),
    ("model.diffusion_model.label_emb.", f"Stable Diffusion XL; {ONLY}"),
    ("joint_blocks.", f"Stable Diffusion 3; {ONLY}"),
    ("double_blocks.", f"Flux; {ONLY}"),
    ("control_model.", f"a ControlNet; {ONLY} and no controls"),
    ("controlnet_cond_embedding", f"a ControlNet; {ONLY} and no controls"),
    ("input_hint_block.", f"a ControlNet; {ONLY} and no controls"),
    ("cond_stage_model.model.", f"Stable Diffusion 2.x; {ONLY}"),
)
_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
    "StableDiffusionPipelineSafe",
)
_PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_OTHERS = {"XL": "Stable Diffusion XL", "3": "Stable Diffusion 3", "ControlNet": "a ControlNet's pipeline"}


def refuse_other_files(path: Path, names: Collection[str]) -> None:
    """Raise :class:`ModelError` for a single file whose tensors are those of another kind of model."""
    for mark, family in _MARKS:
        if any(mark in name for name in names):
            raise ModelError(f"{path} is {family}")


def refuse_other_folders(index: Path, content: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` for a ``model_index.json`` of another kind of pipeline, or of parts of another class.

    The names in it are compared with those that are known, and never imported.
    """
    pipeline = content.get("_class_name")
    if pipeline not in _PIPELINES:
        known = (family for mark, family in _OTHERS.items() if str(pipeline).startswith(f"StableDiffusion{mark}"))
        raise ModelError(f"{index} is of {next(known, repr(pipeline))}; {ONLY}, a StableDiffusionPipeline")
    for part, classes in _PARTS.items():
        said = content.get(part)
        if not isinstance(said, list) or len(said) != 2 or said[1] not in classes:
            raise ModelError(f"{index}: its {part} is {said!r}, and only {' or '.join(classes)} is supported")


def refuse_other_unets(source: Path, content: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` for the configuration of another family's U-Net."""
    if content.get("addition_embed_type") == "text_time":
        raise ModelError(f"{source} is of Stable Diffusion XL; {ONLY}")
    if content.get("use_linear_projection") or content.get("cross_attention_dim") == 1024:
        raise ModelError(f"{source} is of Stable Diffusion 2.x; {ONLY}")
