"""Detect a model's family by keys and configurations, so that what Gobelin cannot open is refused by its name."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gobelin.errors import ModelError

SUPPORTED = "Gobelin opens Stable Diffusion 1.x"

# A part of some tensor's name, and the family of a single file that has it; the first that is found counts.
_KEY_MARKS = (
    ("lora_unet_", "a LoRA: open a model, and add it with load_lora"),
    ("lora_te_", "a LoRA: open a model, and add it with load_lora"),
    (".lora_A.", "a LoRA: open a model, and add it with load_lora"),
    (".lora.down.", "a LoRA: open a model, and add it with load_lora"),
    (".lora_down.", "a LoRA: open a model, and add it with load_lora"),
    ("_lora.down.", "a LoRA: open a model, and add it with load_lora"),
    ("string_to_param", "a textual inversion: open a model, and add it with load_textual_inversion"),
    ("emb_params", "a textual inversion: open a model, and add it with load_textual_inversion"),
    ("conditioner.embedders.", f"Stable Diffusion XL; {SUPPORTED}"),
    ("model.diffusion_model.label_emb.", f"Stable Diffusion XL; {SUPPORTED}"),
    ("joint_blocks.", f"Stable Diffusion 3; {SUPPORTED}"),
    ("double_blocks.", f"Flux; {SUPPORTED}"),
    ("control_model.", f"a ControlNet; {SUPPORTED} and no ControlNets"),
    ("controlnet_cond_embedding", f"a ControlNet; {SUPPORTED} and no ControlNets"),
    ("input_hint_block.", f"a ControlNet; {SUPPORTED} and no ControlNets"),
    ("cond_stage_model.model.", f"Stable Diffusion 2.x; {SUPPORTED}"),
)
_PIPELINE_CLASSES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
    "StableDiffusionPipelineSafe",
)
_COMPONENT_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# What follows "StableDiffusion" in the name of another family's pipeline.
_OTHER_PIPELINES = {
    "XL": "Stable Diffusion XL",
    "3": "Stable Diffusion 3",
    "ControlNet": "a ControlNet's pipeline",
}


def refuse_unsupported_file(path: Path, names: Collection[str]) -> None:
    """Raise :class:`ModelError` that names the family of a single file whose tensors are another family's."""
    for mark, family in _KEY_MARKS:
        if any(mark in name for name in names):
            raise ModelError(f"{path} is {family}")


def refuse_unsupported_pipeline(index: Path, content: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` for a ``model_index.json`` of another pipeline, or with a component of another class.

    Its class names are compared with known ones, and never imported.
    """
    pipeline = content.get("_class_name")
    if pipeline not in _PIPELINE_CLASSES:
        known = (
            family for mark, family in _OTHER_PIPELINES.items() if str(pipeline).startswith(f"StableDiffusion{mark}")
        )
        raise ModelError(f"{index} is of {next(known, repr(pipeline))}; {SUPPORTED}, as a StableDiffusionPipeline")
    for component, classes in _COMPONENT_CLASSES.items():
        found = content.get(component)
        if not isinstance(found, list) or len(found) != 2 or found[1] not in classes:
            raise ModelError(f"{index}: its {component} is {found!r}, and only {' or '.join(classes)} is supported")


def refuse_unsupported_unet(source: Path, content: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` that names the family of a U-Net's configuration that is another family's."""
    if content.get("addition_embed_type") == "text_time":
        raise ModelError(f"{source} is of Stable Diffusion XL; {SUPPORTED}")
    if content.get("use_linear_projection") or content.get("cross_attention_dim") == 1024:
        raise ModelError(f"{source} is of Stable Diffusion 2.x; {SUPPORTED}")
