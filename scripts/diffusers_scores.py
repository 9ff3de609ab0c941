"""Paint the same prompts with Gobelin and with diffusers, from the same noise, and score both.

python scripts/diffusers_scores.py runs/tiny --limit 25

Both take DDIM, which every model folder has a scheduler for. Diffusers' images go through a folder, as any other
program's would.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from torch import Generator

from gobelin.evaluate.benchmark import mean_scores, task_scores
from gobelin.evaluate.gallery import read_gallery, write_image_list
from gobelin.evaluate.image_list import RequestedImage, request_batches, requested_images
from gobelin.evaluate.scene_models import find_model_world
from gobelin.evaluate.scored_images import (
    CPU_BATCH_SIZE,
    GenerationSettings,
    ScoredImage,
    generate_images,
    score_images,
)
from gobelin.pipeline import Pipeline
from gobelin.samplers import NoiseSource


def main(model: Path, limit: int, count: int) -> None:
    """Print the scores of both, and how far their images are apart."""
    pipeline = Pipeline.from_pretrained(model, "cpu")
    world = find_model_world(pipeline)
    requests = requested_images(world, limit=limit, count=count)
    ours = score_images(requests, generate_images(pipeline, requests, GenerationSettings(sampler="ddim")), world)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_image_list(folder, requests, world)
        paint_with_diffusers(model, pipeline, requests, folder)
        gallery = read_gallery(folder)
    theirs = score_images(gallery.requests, gallery.images, world)
    print_both(ours, theirs)
    apart = [difference(one.image, other.image) for one, other in zip(ours, theirs, strict=True)]
    print(
        f"{len(requests):,} images; largest difference of a pixel: {max(apart)} of 255; of the median image: ", end=""
    )
    print(f"{int(np.median(apart))}")


def paint_with_diffusers(model: Path, pipeline: Pipeline, requests: Sequence[RequestedImage], folder: Path) -> None:
    """Every image at its name in the folder; ``pipeline`` says how, and diffusers does it."""
    theirs: Any = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    side, recommended = pipeline.unet.config.sample_size, pipeline.recommended
    shape = (pipeline.unet.config.in_channels, side, side)
    for batch in request_batches(requests, CPU_BATCH_SIZE):
        images = theirs(
            prompt=[each.prompt.text for each in batch],
            latents=NoiseSource([Generator().manual_seed(each.seed) for each in batch], shape)(),
            num_inference_steps=recommended.steps,
            guidance_scale=recommended.guidance,
            guidance_rescale=recommended.guidance_rescale,
        ).images
        for each, image in zip(batch, images, strict=True):
            image.save(folder / each.file_name)


def print_both(ours: Sequence[ScoredImage], theirs: Sequence[ScoredImage]) -> None:
    """The means, and the tasks, side by side."""
    for one, other in zip(task_scores(ours), task_scores(theirs), strict=True):
        print(f"{one.split:8} {one.task:18} gobelin {one.correct}   diffusers {other.correct}")
    for one, other in zip(mean_scores(task_scores(ours)), mean_scores(task_scores(theirs)), strict=True):
        print(f"{one.split:8} {f'mean of {one.tasks}':18} gobelin {one.correct}   diffusers {other.correct}")


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two images' pixels, in 8-bit levels."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", type=int, default=10, help="prompts for each task and split")
    parser.add_argument("--count", type=int, default=1, help="images for each prompt")
    options = parser.parse_args()
    main(options.model, options.limit, options.count)
