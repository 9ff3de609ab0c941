"""Choose the timesteps at which images are looked at: overlaps of nouns' maps with their objects, on the dev split.

    python scripts/look_timesteps.py --captions 96 --json timesteps.json

Looks at the model's own images that the grader finds right, and at true scenes, at every timestep; then scores every
set of up to four of them, by DAAM's protocol at τ = .4 and each pixel given to one noun. The test list is not read.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gobelin.attention import Trace
from gobelin.evaluate.attribution import ATTRIBUTION_SEED, WordTruth, found_masks, overlap, word_truths
from gobelin.evaluate.scene_models import open_scene_model
from gobelin.look.heatmaps import HeatMaps
from gobelin.pipeline import Pipeline
from gobelin.scenes import World, grade, sample

TIMESTEPS = (1, 5, 10, 20, 50, 100, 200, 300, 400, 500)
MOST = 4
THRESHOLD = 0.4
BATCH = 16


@dataclass(frozen=True)
class Case:
    """An image's maps at every timestep, those made while it was painted, and the truths of its nouns."""

    looked: HeatMaps
    painted: HeatMaps | None
    nouns: list[WordTruth]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--captions", type=int, default=96)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pipeline, world = open_scene_model(options.model, None, None, "float32", "eager")
    cases = {
        "own": list(own_cases(pipeline, world, options.captions)),
        "scenes": list(scene_cases(pipeline, world, options.captions)),
    }
    painted = score([(case.painted, case.nouns) for case in cases["own"] if case.painted is not None])
    print(f"{len(cases['own'])} own images, {len(cases['scenes'])} scenes; while painting: {shown(painted)}")
    rows = []
    for size in range(1, MOST + 1):
        for chosen in combinations(range(len(TIMESTEPS)), size):
            scores = {
                kind: score([(case.looked.select(steps=chosen), case.nouns) for case in found])
                for kind, found in cases.items()
            }
            mean = float(np.mean([value for pair in scores.values() for value in pair]))
            rows.append({"timesteps": [TIMESTEPS[step] for step in chosen], "mean": mean, **scores})
    for size in range(1, MOST + 1):
        best = sorted((row for row in rows if len(row["timesteps"]) == size), key=lambda row: -row["mean"])[:5]
        for row in best:
            print(f"{row['timesteps']}: {row['mean']:.3f}; own {shown(row['own'])}; scenes {shown(row['scenes'])}")
    if options.json:
        options.json.write_text(json.dumps({"painted": painted, "sets": rows}, indent=1))


def own_cases(pipeline: Pipeline, world: World, count: int) -> Iterator[Case]:
    """Paint captions of the dev split, and look at the images that are right."""
    for indices in batches(count):
        samples = [sample(ATTRIBUTION_SEED, index, world, "dev") for index in indices]
        result = pipeline([each.caption for each in samples], seed=ATTRIBUTION_SEED + indices[0], trace="sharp")
        right = [
            (each, heatmaps, masks)
            for each, heatmaps in zip(samples, result.heatmaps, strict=True)
            if (masks := found_masks(each.phrasing, grade(heatmaps.image, world))) is not None
        ]
        if right:
            looked = look(pipeline, [maps.image for _, maps, _ in right], [each.caption for each, *_ in right])
            for (each, heatmaps, masks), seen in zip(right, looked, strict=True):
                nouns = [truth for truth in word_truths(each, heatmaps, masks) if truth.kind == "noun"]
                yield Case(looked=seen, painted=heatmaps, nouns=nouns)


def scene_cases(pipeline: Pipeline, world: World, count: int) -> Iterator[Case]:
    """Look at true scenes of the dev split."""
    for indices in batches(count):
        samples = [sample(ATTRIBUTION_SEED, index, world, "dev") for index in indices]
        images = [Image.fromarray(each.image) for each in samples]
        for each, seen in zip(samples, look(pipeline, images, [each.caption for each in samples]), strict=True):
            truths = word_truths(each, seen, torch.from_numpy(each.masks))
            yield Case(looked=seen, painted=None, nouns=[truth for truth in truths if truth.kind == "noun"])


def look(pipeline: Pipeline, images: list[Image.Image], captions: list[str]) -> list[HeatMaps]:
    return pipeline.look(images, captions, timesteps=TIMESTEPS, trace=Trace(sharp=True, per_step=True))


def score(cases: Sequence[tuple[HeatMaps, list[WordTruth]]]) -> tuple[float, float]:
    """Compute nouns' mean overlap at the threshold, and where each pixel goes to one of two or more."""
    single, shared = [], []
    for heatmaps, nouns in cases:
        values = [heatmaps[truth.number].values for truth in nouns]
        single += [overlap(value > THRESHOLD, truth.mask) for value, truth in zip(values, nouns, strict=True)]
        if len({truth.mask.numpy().tobytes() for truth in nouns}) > 1:
            most, winner = torch.stack(values).max(dim=0)
            shared += [overlap((winner == place) & (most > THRESHOLD), truth.mask) for place, truth in enumerate(nouns)]
    return float(np.mean(single)), float(np.mean(shared))


def shown(pair: tuple[float, float]) -> str:
    return f"τ = .4 {pair[0]:.3f}, argmax {pair[1]:.3f}"


def batches(count: int) -> Iterator[range]:
    return (range(start, min(count, start + BATCH)) for start in range(0, count, BATCH))


if __name__ == "__main__":
    main()
