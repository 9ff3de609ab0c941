"""Contenders of whole images: text, guided steps and decoding, by our pipeline, diffusers' and stable-diffusion.cpp."""

import tempfile
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gobelin.bench.our_engines import other_engines
from gobelin.bench.random_weights import (
    diffusers_unet,
    diffusers_vae,
    random_text_encoder,
    random_unet,
    random_vae,
    transformers_text_encoder,
)
from gobelin.bench.unet_contenders import BASE
from gobelin.bench.workload import BenchPrecision, Call, Contender, Workload
from gobelin.checkpoint import Model
from gobelin.pipeline import Pipeline, shipped_model
from gobelin.schedule import NoiseSchedule
from gobelin.tokenizer import Tokenizer

_PROMPT = "a red circle to the left of a blue star"
_GUIDANCE = 7.5
_SAMPLER = "ddim"


@dataclass(frozen=True, kw_only=True)
class PicturePass:
    """Images of one prompt: "tiny" is the model that ships, "sd15" one of random weights, with its vocabulary."""

    model: str
    batch: int
    steps: int
    precision: BenchPrecision

    @property
    def dtype(self) -> torch.dtype:
        """The precision as PyTorch has it."""
        return getattr(torch, self.precision)

    @cached_property
    def ours(self) -> Pipeline:
        """Our pipeline in the row's precision, of whose tensors diffusers' is made."""
        return self.pipeline(self.dtype)

    def pipeline(self, dtype: torch.dtype) -> Pipeline:
        """Make our pipeline in a precision."""
        if self.model == "tiny":
            return Pipeline.from_pretrained(device="cpu", dtype=dtype)
        return random_pipeline(dtype)

    @property
    def latents(self) -> Tensor:
        """Draw the noise that every contender begins from."""
        config = self.ours.unet.config
        shape = (self.batch, config.out_channels, config.sample_size, config.sample_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def paint(self, pipeline: Pipeline) -> Tensor:
        """Paint by our pipeline."""
        result = pipeline(
            [_PROMPT] * self.batch,
            steps=self.steps,
            guidance=_GUIDANCE,
            guidance_rescale=0.0,
            sampler=_SAMPLER,
            latents=self.latents,
            seed=0,
        )
        return _pixels(result.images)

    def reference(self) -> Tensor:
        """Paint in float32."""
        return self.paint(self.ours if self.precision == "float32" else self.pipeline(torch.float32))


def random_pipeline(dtype: torch.dtype) -> Pipeline:
    """Make a pipeline of Stable Diffusion 1.5's size, random weights and 77 tokens a prompt."""
    shipped = Tokenizer.from_pretrained(shipped_model() / "tokenizer")
    model = Model(
        unet=random_unet("sd15", dtype),
        vae=random_vae(dtype),
        text_encoder=random_text_encoder(dtype),
        tokenizer=Tokenizer(dict(shipped.vocab), shipped.merges, max_length=77),
        schedule=NoiseSchedule(),
    )
    return Pipeline(model)


def picture_workload(model: str, batch: int, steps: int, precision: BenchPrecision) -> Workload:
    """Make the workload of painting, all in all, with every contender that there is."""
    run = PicturePass(model=model, batch=batch, steps=steps, precision=precision)
    contenders = [
        Contender(name=BASE, prepare=lambda: lambda: run.paint(run.ours)),
        *[Contender(name=f"{BASE}, {engine}", prepare=partial(_engine, run, engine)) for engine in other_engines()],
        Contender(name="diffusers", peer="diffusers", prepare=partial(_diffusers, run)),
        Contender(name="diffusers, compiled", peer="diffusers", prepare=partial(_diffusers, run, compiled=True)),
    ]
    if model == "sd15":
        contenders.append(
            Contender(
                name="stable-diffusion.cpp",
                peer="stable-diffusion.cpp",
                prepare=partial(_stable_diffusion_cpp, run),
                is_compared=False,  # it has a tokenizer and a noise of its own
            )
        )
    return Workload(contenders=contenders, reference=run.reference, samples=batch)


def diffusers_pipeline(ours: Pipeline) -> Any:
    """Make diffusers' pipeline of the very same tensors, tokenizer and noise schedule."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]
    from transformers import CLIPTokenizer

    from gobelin.checkpoint.diffusers_folder import scheduler_fields

    none: Any = None
    with tempfile.TemporaryDirectory() as folder:
        ours.tokenizer.save_pretrained(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    parts: dict[str, Any] = {
        "vae": diffusers_vae(ours.vae),
        "text_encoder": transformers_text_encoder(ours.text_encoder),
        "unet": diffusers_unet(ours.unet),
        "scheduler": DDIMScheduler.from_config(scheduler_fields(ours.schedule.config)),
    }
    made = StableDiffusionPipeline(
        tokenizer=tokenizer, safety_checker=none, feature_extractor=none, requires_safety_checker=False, **parts
    )
    made.set_progress_bar_config(disable=True)
    return made


def _engine(run: PicturePass, engine: str) -> Call:
    pipeline: Any = Pipeline(run.ours.model)
    pipeline.use(engine)
    return lambda: run.paint(pipeline)


def _diffusers(run: PicturePass, compiled: bool = False) -> Call:
    pipeline = diffusers_pipeline(run.ours)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet)
    latents = run.latents.to(run.dtype)

    def call() -> Tensor:
        images = pipeline(
            [_PROMPT] * run.batch, num_inference_steps=run.steps, guidance_scale=_GUIDANCE, latents=latents.clone()
        ).images
        return _pixels(images)

    return call


def _stable_diffusion_cpp(run: PicturePass) -> Call:
    from stable_diffusion_cpp import StableDiffusion  # pyright: ignore[reportMissingImports]

    side = run.ours.unet.config.sample_size * run.ours.vae.config.factor
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sd15.safetensors"
        run.ours.save_single_file(file, torch.float16)
        model = StableDiffusion(
            model_path=str(file),
            wtype={"float32": "f32", "bfloat16": "f16"}[run.precision],  # on CPUs its half precision is float16
            vae_decode_only=True,
            n_threads=torch.get_num_threads(),
            verbose=False,
        )

    def call() -> Tensor:
        images = model.generate_image(
            prompt=_PROMPT,
            width=side,
            height=side,
            sample_method="euler",
            sample_steps=run.steps,
            cfg_scale=_GUIDANCE,
            seed=0,
        )
        return _pixels(images)

    return call


def _pixels(images: list[Image.Image]) -> Tensor:
    """Convert images to numbers in 0 … 1."""
    return torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255)
