"""Approximate modes of painting: time, scores, the images' distance from exact ones, and what becomes of word maps.

    python scripts/benchmarks/approximate_modes.py --limit 20 --captions 32 --rounds 3 --threads 1
    python scripts/benchmarks/approximate_modes.py --only exact "cache 3" --limit 5 --captions 16 --rounds 0

Every mode paints the same prompts from the same seeds with the model that ships, in turns, batch by batch, and is
compared with the exact images of the same batch: the time (of the processor, with one thread), the score of GenEval's
six tasks by the grader, with the difference of the two paired by image, and the distance of the pixels. Sharp maps of
words are compared with the exact run's, and with the masks of the objects in the mode's own images. A pass of a
U-Net of Stable Diffusion 1.5's size, which has random weights, says what a step takes there.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, cast

import numpy as np
import torch
from paired import print_machine, print_table, write_results

from gobelin.bench.machine import machine
from gobelin.bench.our_engines import run_by
from gobelin.bench.paired import paired_ratio
from gobelin.bench.random_weights import random_unet
from gobelin.evaluate.attribution import ATTRIBUTION_SEED, PROTOCOLS, intersections, overlap, own_samples
from gobelin.evaluate.benchmark import mean_scores, task_scores
from gobelin.evaluate.image_list import RequestedImage, request_batches, requested_images
from gobelin.evaluate.intervals import Mean
from gobelin.evaluate.scene_models import open_scene_model
from gobelin.evaluate.scored_images import ScoredImage, score_images
from gobelin.guidance import classifier_free_guidance, guidance_interval
from gobelin.pipeline import Pipeline
from gobelin.scenes import TASKS, World, sample
from gobelin.shortcuts import DeepFeatures, Shortcuts

STEPS = 25
SCALE = 3.0
_BATCH = 16
_THRESHOLD = 0.4  # of a map's range: DAAM's
_SD15_SIDE, _SD15_TOKENS = 64, 77


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A mode: the settings that ask for it, and the steps that it takes."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    guided: float = 1.0

    @property
    def interval(self) -> int:
        """Steps for each whole one."""
        return self.settings.get("cache_interval", 1)

    @property
    def share(self) -> float:
        """The share of merged patches."""
        return self.settings.get("merge_tokens", 0.0)


def _guided_between(start: float, end: float) -> Mode:
    guidance = guidance_interval(classifier_free_guidance(SCALE), start, end)
    return Mode(settings={"guidance": guidance}, guided=end - start)


MODES = {
    "exact": Mode(),
    "guidance interval 0.2 to 0.8": _guided_between(0.2, 0.8),
    "cache 2": Mode(settings={"cache_interval": 2}),
    "cache 3": Mode(settings={"cache_interval": 3}),
    "cache 5": Mode(settings={"cache_interval": 5}),
    "merge 0.5": Mode(settings={"merge_tokens": 0.5}),
    "merge 0.75": Mode(settings={"merge_tokens": 0.75}),
    "cache 3, merge 0.5": Mode(settings={"cache_interval": 3, "merge_tokens": 0.5}),
    "13 steps": Mode(steps=13),
}


def main() -> None:
    """Measure every mode, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--limit", type=int, default=20, help="prompts of each task and split, 0 for none")
    parser.add_argument("--captions", type=int, default=32, help="whose words' maps are compared, 0 for none")
    parser.add_argument("--rounds", type=int, default=3, help="of passes at Stable Diffusion 1.5's size, 0 for none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    modes = {name: MODES[name] for name in dict.fromkeys(["exact", *options.only])}
    found = machine()
    print_machine(found)

    pipeline, world = open_scene_model(None, device=options.device, dtype="float32")
    requests = requested_images(world, only=TASKS, limit=options.limit, count=1) if options.limit else []
    results: dict[str, dict[str, Any]] = {name: {} for name in modes}
    measures = [partial(images_of, pipeline, world, requests, modes, clock(options))] if requests else []
    measures += [partial(maps_of, pipeline, world, options.captions, modes)] if options.captions else []
    for measure in measures:
        for name, columns in measure().items():
            results[name] |= columns
        write_results(options.json, {"machine": found, "images": len(requests), "modes": results})
    for dtype in (torch.float32, torch.bfloat16) if options.rounds else ():
        passes = sd15_passes(modes, dtype, options.rounds, clock(options))
        for name, mode in modes.items():
            results[name][f"sd15 {str(dtype).removeprefix('torch.')}"] = sd15_step(mode, passes)
        write_results(options.json, {"machine": found, "images": len(requests), "modes": results})
    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    print_table(
        f"Approximate modes: {len(requests):,} images, {options.captions} captions",
        ("", *columns),
        [(name, *(row.get(column, "") for column in columns)) for name, row in results.items()],
    )


def clock(options: argparse.Namespace) -> Callable[[], float]:
    """Choose the clock: of the thread, which other work on the machine changes least, where there is one thread."""
    return thread_time if options.threads == 1 and options.device == "cpu" else perf_counter


def images_of(
    pipeline: Pipeline,
    world: World,
    requests: list[RequestedImage],
    modes: Mapping[str, Mode],
    now: Callable[[], float],
) -> dict[str, dict[str, str]]:
    """Paint and score the requested images in every mode."""
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    scored: dict[str, list[ScoredImage]] = {name: [] for name in modes}
    for batch in request_batches(requests, _BATCH):
        prompts = [request.prompt.text for request in batch]
        for name, mode in modes.items():
            start = now()
            images = pipeline(prompts, seed=batch[0].seed, steps=mode.steps, **mode.settings).images
            seconds[name].append(now() - start)
            scored[name] += score_images(batch, images, world)
    columns: dict[str, dict[str, str]] = {}
    for name in modes:
        gained = [
            [float(one.score.correct) - float(exact.score.correct)]
            for one, exact in zip(scored[name], scored["exact"], strict=True)
        ]
        rms = [distance(one, exact) for one, exact in zip(scored[name], scored["exact"], strict=True)]
        columns[name] = {
            "time": f"{paired_ratio(seconds[name], seconds['exact']).median:.2f}",
            **{f"score, {mean.split}": str(mean.correct) for mean in mean_scores(task_scores(scored[name]))},
            "score less exact's": written_mean(Mean.of(gained)),
            "rms of 255, median": f"{np.median(rms):.1f}",
            "PSNR, dB": "∞" if not np.median(rms) else f"{20 * np.log10(255 / np.median(rms)):.1f}",
        }
    return columns


def distance(one: ScoredImage, other: ScoredImage) -> float:
    """Compute the root mean square of two images' difference, in levels of 255."""
    levels = [np.asarray(each.image, dtype=np.float64) for each in (one, other)]
    return float(np.sqrt(np.square(levels[0] - levels[1]).mean()))


def maps_of(pipeline: Pipeline, world: World, count: int, modes: Mapping[str, Mode]) -> dict[str, dict[str, str]]:
    """Compare sharp maps of words with the exact run's, and with the truth in the mode's own images."""
    captions = [sample(ATTRIBUTION_SEED, index, world, "test").caption for index in range(count)]
    exact: list[torch.Tensor] = []
    columns: dict[str, dict[str, str]] = {}
    for name, mode in modes.items():
        paint = partial(pipeline, steps=mode.steps, **mode.settings)
        maps: list[torch.Tensor] = []
        for start in range(0, count, _BATCH):
            part = captions[start : start + _BATCH]
            traced = paint(part, seed=ATTRIBUTION_SEED + start, trace="sharp").heatmaps
            maps += [heatmaps.stack_words(range(len(heatmaps.words))) for heatmaps in traced]
        exact = exact or maps
        pairs = [pair for one, other in zip(maps, exact, strict=True) for pair in zip(one, other, strict=True)]
        cases = list(own_samples(cast(Pipeline, paint), world, count))
        pointing = intersections(cases, PROTOCOLS["sharp"])["noun", _THRESHOLD]
        columns[name] = {
            "words' maps and exact ones: correlation": f"{np.mean([correlation(*pair) for pair in pairs]):.3f}",
            "IoU": f"{np.mean([overlap(*map(mask, pair)) for pair in pairs]):.3f}",
            "nouns' maps and objects: mIoU": f"{written_mean(pointing)}, {len(cases)} images",
        }
    return columns


def written_mean(mean: Mean) -> str:
    """Write a mean with half of its interval."""
    return f"{mean.value:+.3f} ± {mean.margin:.3f}"


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Compute Pearson's correlation of two maps over the pixels."""
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()


def mask(raw: torch.Tensor) -> torch.Tensor:
    """Threshold a map as :meth:`gobelin.look.heatmaps.HeatMap.mask` does."""
    return (raw - raw.min()) / (raw.max() - raw.min()) > _THRESHOLD


def sd15_passes(
    modes: Mapping[str, Mode], dtype: torch.dtype, rounds: int, now: Callable[[], float]
) -> dict[tuple[bool, float], float]:
    """Time passes of Stable Diffusion 1.5's U-Net, the exact one's being 1: by (is it whole, the share merged)."""
    unet = run_by(unet=random_unet("sd15", dtype)).unet
    latents = torch.randn(1, 4, _SD15_SIDE, _SD15_SIDE).to(dtype)
    text = torch.randn(1, _SD15_TOKENS, 768).to(dtype)
    kinds = dict.fromkeys(
        [(True, 0.0), *((whole, mode.share) for mode in modes.values() for whole in (True, mode.interval == 1))]
    )
    seconds: dict[tuple[bool, float], list[float]] = {kind: [] for kind in kinds}
    kept = DeepFeatures()
    with torch.no_grad():
        unet.trace(latents, torch.tensor([500.0]), text, sites=(), shortcuts=Shortcuts(deep=kept))
        for _ in range(rounds + 1):
            for whole, share in kinds:
                shortcuts = Shortcuts(merge_tokens=share, deep=None if whole else kept)
                start = now()
                unet.trace(latents, torch.tensor([500.0]), text, sites=(), shortcuts=shortcuts)
                seconds[whole, share].append(now() - start)
    return {kind: paired_ratio(each[1:], seconds[True, 0.0][1:]).median for kind, each in seconds.items()}


def sd15_step(mode: Mode, passes: Mapping[tuple[bool, float], float]) -> str:
    """Compute what a mode's painting takes there, all passes of it, the exact one's being 1."""
    whole = sum(step % mode.interval == 0 or step == mode.steps - 1 for step in range(mode.steps))
    shallow = mode.steps - whole
    time = whole * passes[True, mode.share] + (shallow and shallow * passes[False, mode.share])
    return f"{time / STEPS * (1 + mode.guided) / 2:.2f}"


if __name__ == "__main__":
    main()
