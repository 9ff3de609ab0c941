"""A diffusers folder in and out: a folder for each part, and an index that is written last."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from gobelin.checkpoint.detect import refuse_other_folders, refuse_other_unets
from gobelin.checkpoint.model import Model, Recommended
from gobelin.clip import TextEncoder
from gobelin.errors import ModelError
from gobelin.formats.component import DIFFUSERS_VERSION, config_from_json
from gobelin.formats.files import read_json, write_json
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet
from gobelin.vae import VAE

MODEL_INDEX = "model_index.json"
OURS = "gobelin.json"
INPAINTING = "StableDiffusionInpaintPipeline"


def open_folder(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    tokenizer: Tokenizer | None = None,
    vae: VAE | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> Model:
    """Read a diffusers folder; a ``tokenizer`` or a ``vae`` that is given takes the place of the folder's.

    Raises :class:`ModelError` that names the file and what is wrong with it.
    """
    refuse_other_folders(folder / MODEL_INDEX, read_json(folder / MODEL_INDEX))
    unet_config = folder / "unet" / "config.json"
    refuse_other_unets(unet_config, read_json(unet_config))
    how = {"dtype": dtype, "variant": variant, "allow_pickle": allow_pickle}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    ours = folder / OURS
    said = read_json(ours) if ours.is_file() else {}
    if not isinstance(world := said.get("world"), str | None):
        raise ModelError(f"{ours}: world is {world!r}, expected the name of a world of scenes")
    return Model(
        unet=UNet.from_pretrained(folder / "unet", **how).to(device),
        vae=(vae or VAE.from_pretrained(folder / "vae", **how)).to(device),
        text_encoder=TextEncoder.from_pretrained(folder / "text_encoder", **how).to(device),
        tokenizer=tokenizer or Tokenizer.from_pretrained(folder / "tokenizer"),
        schedule=NoiseSchedule(config_from_json(ScheduleConfig, read_json(scheduler), scheduler)),
        recommended=config_from_json(Recommended, said, ours),
        world=world,
        name=folder.resolve().name,
    )


def save_folder(model: Model, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a diffusers folder, in ``dtype`` or in the weights' own precision."""
    model.unet.save_pretrained(folder / "unet", dtype)
    model.vae.save_pretrained(folder / "vae", dtype)
    model.text_encoder.save_pretrained(folder / "text_encoder", dtype)
    model.tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json(model.schedule.config))
    known = {} if model.world is None else {"world": model.world}
    write_json(folder / OURS, dataclasses.asdict(model.recommended) | known)
    kind = {"_class_name": INPAINTING} if model.unet.config.in_channels > model.unet.config.out_channels else {}
    write_json(folder / MODEL_INDEX, MODEL_INDEX_JSON | kind)


def scheduler_json(config: ScheduleConfig) -> dict[str, Any]:
    """The noise schedule as diffusers' ``DDIMScheduler`` reads it."""
    fields = dataclasses.asdict(config)
    if config.timestep_spacing is None:  # each sampler's own, which diffusers takes too where the file is silent
        del fields["timestep_spacing"]
    header = {"_class_name": "DDIMScheduler", "_diffusers_version": DIFFUSERS_VERSION}
    return {**header, **fields, "clip_sample": False, "trained_betas": None}


MODEL_INDEX_JSON = {
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
