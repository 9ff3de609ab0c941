"""Training from the shipped model, scored: a LoRA of a new shape, a style, a new word, DreamBooth with a prior or not.

    python -m scripts.fine_tuning --out runs/fine-tuning                  # all of them, some 40 minutes on two cores
    python -m scripts.fine_tuning --out runs/fine-tuning --only lora

Each draws its own images of something with a known truth, trains with the command that it prints, and has the grader
of the scenes score what was learned, and the model's other tasks, before and after.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from gobelin import scenes
from gobelin.evaluate.image_list import requested_images
from gobelin.evaluate.intervals import Share
from gobelin.evaluate.scored_images import generate_images, score_images
from gobelin.look.contact_sheet import Tile, TileRow, captioned_grid
from gobelin.pipeline import Pipeline
from gobelin.scenes import CORE, World, grade
from gobelin.scenes.colours import BACKGROUNDS
from gobelin.scenes.render import render
from gobelin.scenes.scene import Scene, SceneObject
from gobelin.scenes.shapes import SHAPES

_PHRASES = ("a {} {}", "one {} {}", "a picture of a {} {}", "there is a {} {}")
_SEEDS = 4  # images of each colour that are scored
_TASK_PROMPTS = 50  # of each of the model's tasks
_STYLE, _INK, _PAPER = "a print of", "blue", "sand"


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to a heart, to first order: the curve (x² + y² − 1)³ = x²y³ over the length of its gradient."""
    x, y = np.broadcast_arrays(1.25 * x, -1.25 * y + 0.08)
    inner = x**2 + y**2 - 1
    value = inner**3 - x**2 * y**3
    slope = np.hypot(6 * x * inner**2 - 2 * x * y**3, 6 * y * inner**2 - 3 * x**2 * y**2)
    return value / np.maximum(slope, 1e-3) / 1.25


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Images to learn from, the options of ``gobelin train``, and what a prompt is to paint afterwards."""

    draw: Callable[[Path], None]
    options: tuple[str, ...]
    prompt: str
    shape: str
    ink: str | None = None
    """The colour of the shape where it is not the prompt's."""
    paper: str | None = None
    """The background, where the prompt asks for one."""
    has_prior: bool = False
    """Whether it learns scenes that the model knows beside its own images."""


def draw_hearts(folder: Path, word: str = "heart", count: int = 20) -> None:
    """Draw one heart an image, in any colour, place and size."""
    _draw_shapes(folder, "heart", word, count)


def draw_stars(folder: Path) -> None:
    """Draw stars, which the model knows, under a word that it does not."""
    _draw_shapes(folder, "star", "<gem>", 20)


def draw_prints(folder: Path, count: int = 200) -> None:
    """Draw the model's own scenes, all in one ink on one paper, and say so; their captions name other colours."""
    random, pairs = np.random.default_rng(5), []
    for index in range(count):
        sample = scenes.sample(7, index, CORE, "train")
        things = tuple(replace(thing, colour=_INK) for thing in sample.scene.objects)
        image, _ = render(replace(sample.scene, objects=things, background=_PAPER), noise=CORE.noise, rng=random)
        pairs.append((image, f"{_STYLE} {sample.caption}"))
    _write(folder, pairs)


def _draw_shapes(folder: Path, shape: str, word: str, count: int) -> None:
    random = np.random.default_rng(5)
    pairs = []
    for number in range(count):
        colour, radius = CORE.colours[number % len(CORE.colours)], random.uniform(12, 24)
        x, y = random.uniform(radius + 3, 61 - radius, 2)
        thing = SceneObject(shape=shape, colour=colour, x=x, y=y, radius=radius)
        scene = Scene(objects=(thing,), background=str(random.choice(CORE.backgrounds)))
        image, _ = render(scene, noise=CORE.noise, rng=random)
        pairs.append((image, _PHRASES[number % len(_PHRASES)].format(colour, word)))
    _write(folder, pairs)


def _write(folder: Path, pairs: list[tuple[np.ndarray, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, caption) in enumerate(pairs):
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number:03d}.png")
        lines.append(json.dumps({"file_name": f"{number:03d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


_PRIOR = "scenes"  # beside the experiments' folders: what the model was trained on, which it is to keep
_HEART = "{article} {colour} heart"
_LEARN = ("--unet.optim.batch-size", "8", "--unet.timestep-shift", "2")
_DREAMBOOTH = ("--preset", "dreambooth", "--unet.optim.steps", "400", "--unet.optim.learning-rate", "2e-4", *_LEARN)
EXPERIMENTS = {
    "lora": Experiment(
        draw=draw_hearts,
        options=("--preset", "lora", "--adapter.targets", "all", "--adapter.rank", "32", "--unet.optim.steps", "2000",
                 "--unet.optim.learning-rate", "6e-4", "--prior.weight", "2", *_LEARN),
        prompt=_HEART,
        shape="heart",
        has_prior=True,
    ),
    "style": Experiment(
        draw=draw_prints,
        options=("--preset", "finetune", "--unet.optim.steps", "400", "--unet.optim.learning-rate", "4e-4", *_LEARN),
        prompt=f"{_STYLE} {{article}} {{colour}} circle",
        shape="circle",
        ink=_INK,
        paper=_PAPER,
        has_prior=True,
    ),
    "textual-inversion": Experiment(
        draw=draw_stars,
        options=("--preset", "textual-inversion", "--new-word.word", "<gem>", "--new-word.begin", "circle",
                 "--unet.optim.steps", "600", "--unet.optim.batch-size", "8", "--unet.optim.learning-rate", "2e-2"),
        prompt="{article} {colour} <gem>",
        shape="star",
    ),
    "dreambooth": Experiment(draw=draw_hearts, options=_DREAMBOOTH, prompt=_HEART, shape="heart"),
    "dreambooth-prior": Experiment(
        draw=draw_hearts, options=_DREAMBOOTH, prompt=_HEART, shape="heart", has_prior=True
    ),
}  # fmt: skip


def main() -> None:
    """Draw, train, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=EXPERIMENTS, nargs="+", default=[*EXPERIMENTS])
    parser.add_argument("--prompts", type=int, default=_TASK_PROMPTS, help="of each of the model's tasks")
    options = parser.parse_args()
    SHAPES["heart"] = _heart
    world = replace(CORE, name="core with hearts", shapes=(*CORE.shapes, "heart"))
    before = Pipeline.from_pretrained()
    known = score_tasks(before, options.prompts)
    for name, experiment in EXPERIMENTS.items():
        if name in options.only:
            print(json.dumps(_run(name, experiment, world, before, known, options), indent=2), flush=True)


def _run(
    name: str, experiment: Experiment, world: World, before: Pipeline, known: Share, options: argparse.Namespace
) -> dict:
    data, run, prior = options.out / f"{name}-images", options.out / name, options.out / _PRIOR
    if not data.exists():
        experiment.draw(data)
    command = ["gobelin", "train", *experiment.options, "--data.path", str(data), "--out", str(run)]
    if experiment.has_prior:
        if not prior.exists():
            _call(["gobelin", "data", "scenes", "--out", str(prior), "--count", "2000", "--seed", "11"])
        command += ["--prior.path", str(prior)]
    if (run / "training" / "config.json").exists():
        command.append("--resume")
    _call(command)
    after = Pipeline.from_pretrained()
    if (run / "model_index.json").exists():
        after = Pipeline.from_pretrained(run)
    elif "<" in experiment.prompt:
        after.load_textual_inversion(next(run.glob("*.safetensors")))
    else:
        after.load_lora(run / "adapter.safetensors")
    result = {
        "experiment": name,
        "learned before": str(score_learned(before, experiment, world, None)) if "<" not in experiment.prompt else "0",
        "learned after": str(score_learned(after, experiment, world, run.with_suffix(".png"))),
        "other tasks before": str(known),
        "other tasks after": str(score_tasks(after, options.prompts)),
    }
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=2))
    return result


def _call(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


def score_tasks(pipeline: Pipeline, count: int) -> Share:
    """Score the model's own tasks: the share of prompts of the development list that are painted right."""
    requests = requested_images(CORE, ("dev",), limit=count, count=1)
    images = score_images(requests, generate_images(pipeline, requests), CORE)
    return Share.of([one.score.correct for one in images])


def score_learned(pipeline: Pipeline, experiment: Experiment, world: World, sheet: Path | None) -> Share:
    """Score what was learned: one thing alone, of the shape, colour and paper that were asked for."""
    right, tiles = [], []
    for number, colour in enumerate(CORE.colours):
        prompt = experiment.prompt.format(article="an" if colour == "orange" else "a", colour=colour)
        images = pipeline([prompt] * _SEEDS, seed=[1000 + _SEEDS * number + seed for seed in range(_SEEDS)]).images
        for image in images:
            found = grade(image, world)
            wanted = (experiment.shape, experiment.ink or colour)
            is_right = [(one.shape, one.colour) for one in found] == [wanted]
            right.append(is_right and (experiment.paper is None or _is_on(image, experiment.paper)))
        tiles.append(Tile(image=images[0].resize((128, 128), Image.Resampling.NEAREST), caption=prompt))
    if sheet is not None:
        captioned_grid([TileRow(tiles=tiles)], columns=5, side=128, title=sheet.stem).save(sheet)
    return Share.of(right)


def _is_on(image: Image.Image, paper: str) -> bool:
    """Tell whether an image's border is nearer to this background than to any other."""
    border = np.median(np.asarray(image)[0].astype(int), axis=0)
    return paper == min(CORE.backgrounds, key=lambda name: np.abs(border - BACKGROUNDS[name]).sum())


if __name__ == "__main__":
    main()
