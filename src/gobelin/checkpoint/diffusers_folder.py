"""Diffusers folders, read and written: a folder for each component, and ``model_index.json``, which is written last."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gobelin.checkpoint.detect import (
    refuse_unsupported_pipeline,
    refuse_unsupported_scheduler,
    refuse_unsupported_unet,
)
from gobelin.checkpoint.model import NETWORKS, Model, recommended_from_json
from gobelin.clip import TextEncoder
from gobelin.errors import ModelError
from gobelin.formats.component import DIFFUSERS_VERSION, config_from_json
from gobelin.formats.files import is_there, read_json, write_json
from gobelin.head_weights import HeadWeights
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet
from gobelin.vae import VAE
from gobelin.validation import shown

MODEL_INDEX = "model_index.json"
_GOBELIN_JSON = "gobelin.json"  # what diffusers has no place for: recommended settings, the world of scenes
HEAD_WEIGHTS = "head_weights.json"


def open_folder(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    tokenizer: Tokenizer | None = None,
    vae: VAE | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    schedule: Mapping[str, Any] | None = None,
) -> Model:
    """Read a diffusers folder onto ``device``, in ``dtype`` or each tensor's own precision (None).

    A ``tokenizer`` or a ``vae`` that is given takes the place of the folder's, and so do fields of the ``schedule``.
    Raises :class:`ModelError` that names the file and what is wrong with it.
    """
    refuse_unsupported_pipeline(folder / MODEL_INDEX, read_json(folder / MODEL_INDEX))
    unet_config = folder / "unet" / "config.json"
    refuse_unsupported_unet(unet_config, read_json(unet_config))
    options = {"dtype": dtype, "variant": variant, "allow_pickle": allow_pickle}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    said = read_json(scheduler)
    refuse_unsupported_scheduler(scheduler, said)
    if variant is not None and not any(list(folder.glob(f"{network}/*.{variant}.*")) for network in NETWORKS):
        raise ModelError(f"{folder} has no file of the variant {shown(variant)}: leave it out, or give another")
    extra_file = folder / _GOBELIN_JSON
    extra = read_json(extra_file) if is_there(extra_file) else {}
    if not isinstance(world := extra.get("world"), str | None):
        raise ModelError(f"{extra_file}: world is {world!r}, expected the name of a world of scenes")
    examples = extra.get("examples", [])
    if not isinstance(examples, list) or not all(isinstance(one, str) for one in examples):
        raise ModelError(f"{extra_file}: examples is {shown(str(examples))}, expected a list of prompts")
    heads_file = folder / HEAD_WEIGHTS
    return Model(
        unet=UNet.from_pretrained(folder / "unet", **options).to(device),
        vae=(vae or VAE.from_pretrained(folder / "vae", **options)).to(device),
        text_encoder=TextEncoder.from_pretrained(folder / "text_encoder", **options).to(device),
        tokenizer=tokenizer or Tokenizer.from_pretrained(folder / "tokenizer"),
        schedule=NoiseSchedule(config_from_json(ScheduleConfig, {**said, **(schedule or {})}, scheduler)),
        recommended=recommended_from_json(extra, extra_file),
        world=world,
        examples=tuple(examples),
        pointing=extra["pointing"] if isinstance(extra.get("pointing"), dict) else None,
        head_weights=HeadWeights.from_json(read_json(heads_file), heads_file) if is_there(heads_file) else None,
        name=folder.resolve().name,
    )


def save_folder(model: Model, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a diffusers folder, in ``dtype`` or in the weights' own precision (None)."""
    model.unet.save_pretrained(folder / "unet", dtype)
    model.vae.save_pretrained(folder / "vae", dtype)
    model.text_encoder.save_pretrained(folder / "text_encoder", dtype)
    model.tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_fields(model.schedule.config))
    world = {} if model.world is None else {"world": model.world}
    examples = {"examples": list(model.examples)} if model.examples else {}
    write_json(folder / _GOBELIN_JSON, dict(model.recommended) | world | examples)
    if model.head_weights is not None:
        write_json(folder / HEAD_WEIGHTS, model.head_weights.to_json())
    else:
        (folder / HEAD_WEIGHTS).unlink(missing_ok=True)  # another model's
    inpaints = model.unet.config.in_channels > model.unet.config.out_channels
    pipeline = {"_class_name": "StableDiffusionInpaintPipeline"} if inpaints else {}
    write_json(folder / MODEL_INDEX, _INDEX_FIELDS | pipeline)


def scheduler_fields(config: ScheduleConfig) -> dict[str, Any]:
    """Return the noise schedule as the fields of diffusers' ``DDIMScheduler``."""
    fields = dataclasses.asdict(config)
    if config.timestep_spacing is None:  # each sampler's own: so it is in diffusers too, where the field is absent
        del fields["timestep_spacing"]
    header = {"_class_name": "DDIMScheduler", "_diffusers_version": DIFFUSERS_VERSION}
    return {**header, **fields, "clip_sample": False, "trained_betas": None}


_INDEX_FIELDS = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
