"""Detect a model's family by keys and configurations, so that what Gobelin cannot open is refused by its name."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gobelin.errors import ModelError
from gobelin.formats.families import named_family
from gobelin.validation import shown

SUPPORTED = "Gobelin opens Stable Diffusion 1.x"

# A part of some tensor's name, and the family of a single file that has it; the first that is found counts.
_KEY_MARKS = (
    ("motion_modules.", f"AnimateDiff's motion module; {SUPPORTED} and no films"),
    ("ip_adapter.", f"an IP-Adapter; {SUPPORTED} and no IP-Adapters"),
    ("image_proj.", f"an IP-Adapter; {SUPPORTED} and no IP-Adapters"),
    ("lllite_", f"a ControlNet-LLLite; {SUPPORTED} and no ControlNets"),
    ("position_net.", f"GLIGEN; {SUPPORTED}"),
    (".fuser.", f"GLIGEN; {SUPPORTED}"),
    ("cond_proj.weight", f"an LCM that takes its guidance as an input; {SUPPORTED}, and LCM-LoRAs"),
    ("temporal_transformer", f"a model of films; {SUPPORTED}"),
    ("time_stack.", f"Stable Video Diffusion; {SUPPORTED}"),
    (".rdb1.", f"an upscaler (ESRGAN); {SUPPORTED}"),
    (".RDB1.", f"an upscaler (ESRGAN); {SUPPORTED}"),
    ("taesd_", "TAESD, a small VAE: give a whole one"),
    ("bitsandbytes__", f"quantized by bitsandbytes; {SUPPORTED} in float8, float16, bfloat16 and float32"),
    ("lora_unet_", "a LoRA: open a model, and add it with load_lora"),
    ("lora_te_", "a LoRA: open a model, and add it with load_lora"),
    (".lora_A.", "a LoRA: open a model, and add it with load_lora"),
    (".lora.down.", "a LoRA: open a model, and add it with load_lora"),
    (".lora_down.", "a LoRA: open a model, and add it with load_lora"),
    ("_lora.down.", "a LoRA: open a model, and add it with load_lora"),
    ("string_to_param", "a textual inversion: open a model, and add it with load_textual_inversion"),
    ("emb_params", "a textual inversion: open a model, and add it with load_textual_inversion"),
    ("lora_te1_", "a LoRA: open a model, and add it with load_lora"),
    ("hada_w1_a", "a LyCORIS (LoHa): open a model, and add it with load_lora"),
    ("lokr_w", "a LyCORIS (LoKr): open a model, and add it with load_lora"),
    ("add_embedding.linear_1.", f"Stable Diffusion XL; {SUPPORTED}"),
    ("conditioner.embedders.", f"Stable Diffusion XL; {SUPPORTED}"),
    ("model.diffusion_model.label_emb.", f"Stable Diffusion XL; {SUPPORTED}"),
    ("adaln_single.", f"PixArt; {SUPPORTED}"),
    ("joint_blocks.", f"Stable Diffusion 3; {SUPPORTED}"),
    ("double_blocks.", f"Flux; {SUPPORTED}"),
    ("control_model.", f"a ControlNet; {SUPPORTED} and no ControlNets"),
    ("controlnet_down_blocks.", f"a ControlNet; {SUPPORTED} and no ControlNets"),
    ("controlnet_cond_embedding", f"a ControlNet; {SUPPORTED} and no ControlNets"),
    ("input_hint_block.", f"a ControlNet; {SUPPORTED} and no ControlNets"),
    ("cond_stage_model.model.", f"Stable Diffusion 2.x; {SUPPORTED}"),
)
# How some tensor's name begins, and what a file that has it is, if it is no whole model.
_NETWORK_MARKS = (
    ("down_blocks.", "the U-Net of a diffusers folder: give the folder that holds unet, vae and text_encoder"),
    ("encoder.down_blocks.", "a VAE (of a diffusers folder): give it as vae"),
    ("encoder.down.", "a VAE: give it as vae"),
    ("first_stage_model.", "a VAE: give it as vae"),
    ("decoder.up.", "the decoder of a VAE alone: give a whole VAE"),
    ("embeddings.token_embedding.", "a text encoder: give the folder that holds unet, vae and text_encoder"),
    ("decoder.layers.", "TAESD, a small VAE: give a whole one"),
    ("encoder.layers.", "TAESD, a small VAE: give a whole one"),
    ("text_model.encoder.", "a text encoder: give the folder that holds unet, vae and text_encoder"),
    ("cond_stage_model.", "a text encoder: give a file of a whole model"),
    ("vision_model.", "the image encoder of a CLIP, which Stable Diffusion 1.x does not have"),
    ("input_blocks.", "a U-Net alone: give a file of a whole model"),
    ("unet.", "a model with the names of diffusers in one file: give the folder, or an original single file"),
    ("adapter.body.", "a T2I-Adapter, which Gobelin does not have"),
    ("body.", "a T2I-Adapter or an upscaler, which Gobelin does not have"),
    ("conv_first.", "an upscaler, which Gobelin does not have"),
    ("model.0.weight", "an upscaler (ESRGAN), which Gobelin does not have"),
    ("params_ema.", "an upscaler, which Gobelin does not have"),
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
# diffusers' schedulers of β, α and ε or v, which Gobelin's samplers or others sample the same model with.
_SCHEDULER_CLASSES = {
    *("DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
    *("PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "UniPCMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler"),
    *("DPMSolverSDEScheduler", "DEISMultistepScheduler", "LCMScheduler", "TCDScheduler", "SASolverScheduler"),
}
# What follows "StableDiffusion" in the name of another family's pipeline.
_OTHER_PIPELINES = {
    "XL": "Stable Diffusion XL",
    "3": "Stable Diffusion 3",
    "ControlNet": "a ControlNet's pipeline",
}


def refuse_unsupported_file(path: Path, names: Collection[str], metadata: Mapping[str, str]) -> None:
    """Raise :class:`ModelError` that names the family of a file, where its tensors or its metadata are another's."""
    for mark, family in _KEY_MARKS:
        if any(mark in name for name in names):
            raise ModelError(f"{path} is {family}")
    if (named := named_family(metadata)) is not None:
        raise ModelError(f"{path} is of {named}, as its metadata says; {SUPPORTED}")


def describe_network_file(names: Collection[str]) -> str | None:
    """Describe a single file that holds one network or another kind of weights, and what to do; None if it does not."""
    for mark, what in _NETWORK_MARKS:
        if any(name.startswith(mark) for name in names):
            return what
    return None


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


def refuse_unsupported_scheduler(source: Path, content: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` for a scheduler of another kind of diffusion, or without the noise schedule's betas.

    diffusers' classes have betas of their own where a file has none, and they are not Stable Diffusion's.
    """
    found = content.get("_class_name")
    if found is not None and str(found) not in _SCHEDULER_CLASSES:
        raise ModelError(f"{source} is a {shown(found)}, whose kind of noise Gobelin does not have")
    for name in ("beta_start", "beta_end", "beta_schedule"):
        if name not in content:
            raise ModelError(f"{source} lacks the field {name!r}")


def refuse_unsupported_unet(source: Path, content: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` that names the family of a U-Net's configuration that is another family's."""
    if content.get("addition_embed_type") == "text_time":
        raise ModelError(f"{source} is of Stable Diffusion XL; {SUPPORTED}")
    if content.get("use_linear_projection") or content.get("cross_attention_dim") == 1024:
        raise ModelError(f"{source} is of Stable Diffusion 2.x; {SUPPORTED}")
