"""The work of ``gobelin evaluate scenes``, ``images`` and ``prompts``: images scored, whoever painted them."""

import sys

from gobelin.checkpoint.shipped import find_model
from gobelin.cli.evaluate_options import BenchmarkFiles, EvaluateImages, EvaluatePrompts, EvaluateScenes
from gobelin.cli.report_files import progress_bar, publish, require_sheet_suffix, write_sheet
from gobelin.clip import IMAGE_ENCODER, ImageEncoder
from gobelin.data import find_world
from gobelin.errors import UsageError
from gobelin.evaluate.benchmark import Benchmark, benchmark_report, measure_images, measure_scenes
from gobelin.evaluate.failures_sheet import failures_sheet
from gobelin.evaluate.gallery import write_image_list
from gobelin.evaluate.image_list import requested_images
from gobelin.evaluate.scene_models import open_scene_model
from gobelin.evaluate.scored_images import GenerationSettings


def evaluate_scenes(options: EvaluateScenes) -> None:
    """Generate images with a model, and score them."""
    require_sheet_suffix(options.sheet)
    if options.seed < 0:
        raise UsageError(f"the seed is {options.seed}: give 0 or more")
    pipeline, world = open_scene_model(options.model, options.world, options.device, options.dtype, options.engine)
    requests = requested_images(world, options.splits, options.tasks, options.limit, options.count)
    image_encoder, folder = None, find_model(options.model) / IMAGE_ENCODER
    if folder.is_dir():
        image_encoder = ImageEncoder.from_pretrained(folder).to(pipeline.unet.device)
    else:
        print(f"gobelin: no retrieval scores, as there is no {folder}", file=sys.stderr)
    generation = GenerationSettings(
        sampler=options.sampler, steps=options.steps, guidance=options.guidance, seed=options.seed
    )
    with progress_bar("generating", len(requests)) as advance:
        benchmark = measure_scenes(pipeline, world, requests, generation, image_encoder, advance)
    _publish_benchmark(options, benchmark)


def evaluate_images(options: EvaluateImages) -> None:
    """Score images that are there already."""
    require_sheet_suffix(options.sheet)
    benchmark = measure_images(options.folder, None if options.world is None else find_world(options.world))
    if resized := benchmark.settings["resized"]:
        total, size = len(benchmark.images), find_world(benchmark.world).size
        print(f"gobelin: {resized:,} of {total:,} images are not {size}×{size} and were resized", file=sys.stderr)
    _publish_benchmark(options, benchmark)


def evaluate_prompts(options: EvaluatePrompts) -> None:
    """Write the list of images for another program."""
    if options.seed < 0:
        raise UsageError(f"the seed is {options.seed}: give 0 or more")
    world = find_world(options.world)
    requests = requested_images(world, options.splits, options.tasks, options.limit, options.count)
    write_image_list(options.out, requests, world, options.seed)
    print(f"{len(requests):,} images to generate: {options.out}")


def _publish_benchmark(options: BenchmarkFiles, benchmark: Benchmark) -> None:
    """Print a benchmark's report, and write it and the contact sheet where the options ask for them."""
    content = benchmark.to_json()
    publish(options, content, benchmark_report(content))
    if options.sheet is not None:
        sheet = failures_sheet(benchmark.images, f"{benchmark.model}: a sample of its images, and where it fails")
        write_sheet(options.sheet, sheet)
