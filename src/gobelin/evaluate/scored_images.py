"""Scored images: generate images from prompts of the scenes, grade them, and score them for their prompts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from gobelin.evaluate.image_list import RequestedImage, request_batches
from gobelin.pipeline import Pipeline
from gobelin.scenes import Detection, Prompt, Score, World, grade, score

CPU_BATCH_SIZE = 32  # more are no faster on a CPU, and take more memory
GPU_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings of the images; None takes the model's recommendation. ``seed`` is added to every image's own."""

    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """An image generated for a prompt, the grader's detections in it, and its score."""

    request: RequestedImage
    image: Image.Image
    detections: list[Detection]
    score: Score

    @property
    def prompt(self) -> Prompt:
        """The prompt that the image was generated for."""
        return self.request.prompt


def generate_images(
    pipeline: Pipeline,
    requests: Sequence[RequestedImage],
    generation: GenerationSettings | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Image.Image]:
    """Generate the requested images in their order; an image is the same whatever the batches.

    ``advance`` is called with the number of images of each finished batch.
    """
    generation = generation or GenerationSettings()
    most = CPU_BATCH_SIZE if pipeline.unet.device.type == "cpu" else GPU_BATCH_SIZE
    for batch in request_batches(requests, most):
        with torch.inference_mode():
            result = pipeline(
                [request.prompt.text for request in batch],
                seed=generation.seed + batch[0].seed,
                sampler=generation.sampler,
                steps=generation.steps,
                guidance=generation.guidance,
            )
        yield from result.images
        advance(len(batch))


def score_images(requests: Iterable[RequestedImage], images: Iterable[Image.Image], world: World) -> list[ScoredImage]:
    """Grade each image without its prompt, then score the detections for the prompt."""
    scored = []
    for request, image in zip(requests, images, strict=True):
        found = grade(image, world)
        scored.append(ScoredImage(request=request, image=image, detections=found, score=score(request.prompt, found)))
    return scored


def group_by_task(images: Sequence[ScoredImage]) -> dict[tuple[str, str], list[ScoredImage]]:
    """Group the images by (task, split), in their order."""
    groups: dict[tuple[str, str], list[ScoredImage]] = {}
    for each in images:
        groups.setdefault((each.prompt.task, each.request.split), []).append(each)
    return groups
