"""Choose the timesteps at which images are looked at: overlaps of words' maps with their objects, on the dev split.

    python scripts/look_timesteps.py --captions 96 --json timesteps.json

Looks at the model's own images that the grader finds right, and at true scenes, at every timestep; then scores every
set of up to three of them, by DAAM's protocol at τ = .4: nouns, nouns where each pixel goes to one, colours. Of the
sets whose nouns overlap nearly as well as the best set's, that of the best colours is chosen. No test list is read.
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

TIMESTEPS = (1, 5, 20, 50, 100, 150, 200, 300, 400, 500, 600)
MOST = 3
NEAR = 0.005  # a mean overlap of nouns this near to the best one is as good
THRESHOLD = 0.4
BATCH = 16


@dataclass(frozen=True)
class Case:
    """An image's maps at every timestep, those made while it was painted, and the truths of its words."""

    looked: HeatMaps
    painted: HeatMaps | None
    truths: list[WordTruth]


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
    painted = score([(case.painted, case.truths) for case in cases["own"] if case.painted is not None])
    print(f"{len(cases['own'])} own images, {len(cases['scenes'])} scenes; while painting: {shown(painted)}")
    rows = []
    for size in range(1, MOST + 1):
        for chosen in combinations(range(len(TIMESTEPS)), size):
            scores = {
                kind: score([(case.looked.select(steps=chosen), case.truths) for case in found])
                for kind, found in cases.items()
            }
            nouns = float(np.mean([found[name] for found in scores.values() for name in ("nouns", "argmax")]))
            colours = float(np.mean([found["colours"] for found in scores.values()]))
            rows.append(
                {"timesteps": [TIMESTEPS[step] for step in chosen], "nouns": nouns, "colours": colours, **scores}
            )
    best = max(row["nouns"] for row in rows)
    near = sorted((row for row in rows if row["nouns"] >= best - NEAR), key=lambda row: -row["colours"])
    single = [row for row in rows if len(row["timesteps"]) == 1]
    for row in [*near[:12], *single]:
        print(
            f"{row['timesteps']}: nouns {row['nouns']:.3f}, colours {row['colours']:.3f}; own {shown(row['own'])}; "
            f"scenes {shown(row['scenes'])}"
        )
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
                yield Case(looked=seen, painted=heatmaps, truths=list(word_truths(each, heatmaps, masks)))


def scene_cases(pipeline: Pipeline, world: World, count: int) -> Iterator[Case]:
    """Look at true scenes of the dev split."""
    for indices in batches(count):
        samples = [sample(ATTRIBUTION_SEED, index, world, "dev") for index in indices]
        images = [Image.fromarray(each.image) for each in samples]
        for each, seen in zip(samples, look(pipeline, images, [each.caption for each in samples]), strict=True):
            truths = list(word_truths(each, seen, torch.from_numpy(each.masks)))
            yield Case(looked=seen, painted=None, truths=truths)


def look(pipeline: Pipeline, images: list[Image.Image], captions: list[str]) -> list[HeatMaps]:
    return pipeline.look(images, captions, timesteps=TIMESTEPS, trace=Trace(sharp=True, per_step=True))


def score(cases: Sequence[tuple[HeatMaps, list[WordTruth]]]) -> dict[str, float]:
    """Compute mean overlaps: of nouns, of nouns where each pixel goes to one of several, of colours."""
    found: dict[str, list[float]] = {"nouns": [], "argmax": [], "colours": []}
    for heatmaps, truths in cases:
        nouns = [truth for truth in truths if truth.kind == "noun"]
        values = [heatmaps[truth.number].values for truth in nouns]
        found["nouns"] += [overlap(value > THRESHOLD, truth.mask) for value, truth in zip(values, nouns, strict=True)]
        if len({truth.mask.numpy().tobytes() for truth in nouns}) > 1:
            most, winner = torch.stack(values).max(dim=0)
            found["argmax"] += [
                overlap((winner == place) & (most > THRESHOLD), truth.mask) for place, truth in enumerate(nouns)
            ]
        found["colours"] += [
            overlap(heatmaps[truth.number].mask(THRESHOLD), truth.mask) for truth in truths if truth.kind == "colour"
        ]
    return {name: float(np.mean(overlaps)) for name, overlaps in found.items()}


def shown(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def batches(count: int) -> Iterator[range]:
    return (range(start, min(count, start + BATCH)) for start in range(0, count, BATCH))


if __name__ == "__main__":
    main()
